"""Makes one image with an adapter at 80%, and says what was applied: python examples/generate.py [HOST:PORT]"""

import sys

from lora_client import LoraClient

with LoraClient(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051") as client:
    result = client.generate("a big red star on a navy background", adapters=["neon:0.8"], seed=42)
    path = result.images[0].save("star.png")
    print(path, result.images[0].provenance.adapters)
