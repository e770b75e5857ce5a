"""Hugging Face directories in and out. Our checkpoints hold such directories too, so both ways are checked copies of
bytes; torch is imported only to change a dtype or to read a .bin file."""
