"""Data of `pplug-hf demo`: synthetic readers, a tiny backbone and encoder (scripts/make_demo_assets.py)."""
