"""How long an audit is, by its config. The dry run asks here too."""

from __future__ import annotations

from dataclasses import replace

from megatron_gil.config import AuditConfig

FOREVER = 10**9
"""Updates."""


def at_rest(config: AuditConfig) -> AuditConfig:
    """The config of a trainer whose policy never moves. The planned number of iterations stays: learning rates are
    those that the run's first iterations have."""
    return replace(config, gil=replace(config.gil, warmup_updates=FOREVER))


def num_training_iterations(config: AuditConfig) -> int:
    """0 where the groups are known and there is nothing to train."""
    return config.audit.iterations if config.gil.is_learned else 0


def num_measured_rollouts(config: AuditConfig) -> int:
    return -(-config.audit.responses // config.ppo.num_rows)


def audit_length(config: AuditConfig) -> str:
    """How much there is to do."""
    measured = num_measured_rollouts(config)
    trained = num_training_iterations(config)
    text = f"{trained:,} iterations of {config.ppo.prompts} prompts with the policy at rest, then " if trained else ""
    return f"{text}{measured:,} rollouts of {config.ppo.num_rows} responses to measure"
