"""Settings of the GPU tests."""

import os

# Each pytest process compiles; with torch's default, each would also start one compiler process per core.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
