"""The name under which the first release had its only reader; `reader.AdapterReader` reads PEFT and all else."""

from lora_server.adapters.formats.reader import AdapterReader as PeftReader

__all__ = ["PeftReader"]
