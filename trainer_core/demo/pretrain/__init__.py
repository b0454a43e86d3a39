"""How the embedded demo model was made: `python -m trainer_core.demo.pretrain --out DIR`."""
