"""The pre-training of the embedded demo model: `python -m tools.pretrain_demo --out DIR`."""
