"""GPT-Neo in JAX and Flax; begin reading at main.py and config.py."""
