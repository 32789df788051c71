"""The command line. gRPC's core writes lines of its own to standard error unless it is told before it is imported."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
