"""What encoding a prompt and decoding an image cost beside the steps, and what would make them cheaper.

python -m benchmarks.decoding [--preset sd35-medium-random] [--device cuda] [--sizes 512,1024]
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.presets import PRESETS
from benchmarks.timing import graphed, median_s


def main() -> None:
    """Prints milliseconds of each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", default="128")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_cuda = device.type == "cuda"
    pipeline = PRESETS[arguments.preset].pipeline(device, torch.bfloat16 if on_cuda else torch.float32)
    vae = pipeline.vae
    with torch.inference_mode():

        def encode() -> object:
            return pipeline.encode_prompt(["a", "b"], None, None, do_classifier_free_guidance=False, device=device)

        print(f"encode two prompts {median_s(encode, device, runs=5) * 1e3:.2f} ms", flush=True)
        for side in map(int, arguments.sizes.split(",")):
            for images in (1, 4) if side < 1024 else (1,):
                latents = torch.randn(images, 16, side // 8, side // 8, device=device, dtype=vae.dtype)

                def decode(latents: torch.Tensor = latents) -> object:
                    return vae.decode(latents, return_dict=False)[0]

                for layout in (torch.contiguous_format, torch.channels_last):
                    vae.to(memory_format=layout)
                    for tuned in (False, True) if on_cuda else (False,):
                        torch.backends.cudnn.benchmark = tuned
                        seconds = median_s(decode, device, runs=5)
                        print(f"decode {images} of {side} px {layout} tuned={tuned} {seconds * 1e3:.2f} ms", flush=True)
                if on_cuda:
                    eager = vae.decoder.forward
                    vae.decoder.forward = torch.compile(eager, dynamic=False)
                    compiled = graphed(decode)
                    print(
                        f"decode {images} of {side} px compiled {median_s(compiled, device) * 1e3:.2f} ms", flush=True
                    )
                    vae.decoder.forward = eager


if __name__ == "__main__":
    main()
