"""What `pplug-hf demo` runs on: synthetic readers, a tiny backbone and encoder (scripts/make_demo_assets.py)."""
