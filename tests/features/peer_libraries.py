"""Run by the interpreter that has SAELens and sparsify: writes dictionaries with them and applies what they load.

One request a line on the standard input, as JSON; one answer a line on the standard output: ``null``, or an error.
"""

import json
import os
import sys
import traceback

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file, save_file


def randomise(module: torch.nn.Module) -> None:
    """Weights with which every option shows: biases and thresholds away from 0, decoder rows of different norms."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * 0.5
        if name == "threshold":
            values = values.abs() + 0.2
        parameter.data.copy_(values)


def write_saelens(
    folder: str, architecture: str, options: dict, training: bool = False, inference: bool = True
) -> None:
    from sae_lens import SAE, TrainingSAE
    from sae_lens.saes.sae import SAEMetadata

    base = TrainingSAE if training else SAE
    options = {"d_in": 12, "d_sae": 40, "architecture": architecture, **options}
    metadata = options.pop("metadata", {})
    sae = base.from_dict(options)
    sae.cfg.metadata = SAEMetadata(**metadata)
    if training:
        sae.cfg.add_training_info_to_metadata()
    randomise(sae)
    if training and hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(0.7)
    if training and inference:
        sae.save_inference_model(folder)
    else:
        sae.save_model(folder)


def apply_saelens(folder: str, x: torch.Tensor, fold: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder, dtype="float32")
    if fold is not None:
        sae.fold_activation_norm_scaling_factor(fold)
    codes = sae.encode(x)
    return codes, sae.decode(codes)


def write_sparsify(folder: str, options: dict, dtype: str = "float32") -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(12, SparseCoderConfig(**options), dtype=getattr(torch, dtype))
    randomise(coder)
    coder.save_to_disk(folder)


def apply_sparsify(folder: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder).float()
    values, indices, _ = coder.encode(x)
    codes = torch.zeros(x.shape[0], coder.num_latents).scatter_(1, indices, values)
    # Not forward(): with multi_topk that returns the reconstruction from 4 k winners, which is a term of the loss.
    return codes, coder.decode(values, indices)


def answer(request: dict) -> None:
    action = globals()[request.pop("action")]
    if "x" not in request:
        action(**request)
        return
    probe = request.pop("x")
    codes, output = action(x=load_file(probe)["x"], **request)
    save_file({"codes": codes.contiguous(), "output": output.contiguous()}, probe + ".answer")


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # sparsify greets on the standard output
    for line in sys.stdin:
        try:
            with torch.no_grad():
                answer(json.loads(line))
            reply = None
        except Exception:
            reply = traceback.format_exc()
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
