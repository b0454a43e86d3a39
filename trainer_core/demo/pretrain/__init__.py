"""The pre-training of the embedded demo model: `python -m trainer_core.demo.pretrain --out DIR`."""
