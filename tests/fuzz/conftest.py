from hypothesis import HealthCheck, settings

settings.register_profile("fuzz", max_examples=1500, suppress_health_check=list(HealthCheck))
