"""Writes checkpoints as trainers do, with their own libraries; two processes run this at once.

Below `truth/` there is each model's own state_dict, gathered by the library.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from tests.builders.models import fine_tuned, save, save_tokenizer, tiny_model

# One dimension of each kind is odd: ranks have different shares.
SIZES = {"intermediate_size": 81, "vocab_size": 321}
FAMILIES = {"tied": "smollm2", "untied": "qwen2.5"}


def model_of(tie: str, seed: int = 0) -> Any:
    base = tiny_model(FAMILIES[tie], seed=1, num_layers=2, sizes=SIZES)
    return fine_tuned(base, seed) if seed else base


def keep(path: Path, weights: dict[str, Tensor], name: str = "truth") -> None:
    if dist.get_rank() == 0:
        path = path.parent / "truth" / path.name
        path.mkdir(parents=True, exist_ok=True)
        # safetensors refuses tensors that share memory.
        save_file({n: t.detach().clone() for n, t in weights.items()}, path / f"{name}.safetensors")


def batch() -> Tensor:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randint(0, 300, (1, 8), generator=generator)


def write_zero(root: Path, tie: str, stage: int) -> None:
    import deepspeed

    path = root / f"zero-{stage}-{tie}" / "checkpoint-2"
    engine: Any = deepspeed.initialize(
        model=model_of(tie, seed=stage),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_force_ds_cpu_optimizer": False,
        },
    )[0]
    for _ in range(2):
        ids = batch()
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(str(path), tag="global_step2")
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        keep(path.parent, engine.module.state_dict(), "bf16")
    dist.barrier()
    if dist.get_rank() == 0:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        keep(path.parent, get_fp32_state_dict_from_zero_checkpoint(str(path), tag="global_step2"))
        engine.module.config.save_pretrained(path)
    dist.barrier()


def write_universal(root: Path, tie: str, stage: int) -> None:
    from deepspeed.checkpoint import ds_to_universal

    if dist.get_rank() == 0:
        source = root / f"zero-{stage}-{tie}" / "checkpoint-2" / "global_step2"
        target = root / f"universal-{stage}-{tie}" / "global_step2_universal"
        sys.argv = ["x", "--input_folder", str(source), "--output_folder", str(target)]
        sys.argv += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        sys.argv += ["--inject_missing_state"] * (stage < 3)
        ds_to_universal.main(ds_to_universal.parse_arguments())
    dist.barrier()


def write_fsdp(root: Path, tie: str, mesh: tuple[int, ...]) -> None:
    """verl's layout, by FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = model_of(tie, seed=20)
    truth = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = root / f"fsdp-{len(mesh)}d-{tie}"
    keep(run, truth)
    device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("ddp", "fsdp")[-len(mesh) :])
    for layer in model.model.layers:
        fully_shard(layer, mesh=device_mesh)
    fully_shard(model, mesh=device_mesh)
    actor = run / "global_step_7" / "actor"
    (actor / "huggingface").mkdir(parents=True, exist_ok=True)
    name = f"model_world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt"
    torch.save(model.state_dict(), actor / name)
    if dist.get_rank() == 0:
        model.config.save_pretrained(actor / "huggingface")
    dist.barrier()


def write_dcp(root: Path, tie: str) -> None:
    """As accelerate writes it below checkpoint-N, and plain, with an optimizer's state."""
    from torch.distributed.checkpoint import state_dict_saver as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = model_of(tie)
    run = root / f"dcp-{tie}"
    keep(run, {name: tensor.clone() for name, tensor in model.state_dict().items()})
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    weights = model.state_dict()
    dcp.save({"model": weights}, checkpoint_id=run / "checkpoint-3" / "pytorch_model_fsdp_0")
    moments = {"optimizer": {"state": {n: {"exp_avg": t, "step": 3} for n, t in weights.items()}}}
    dcp.save({**weights, **moments}, checkpoint_id=run / "step-3")
    if dist.get_rank() == 0:
        model.config.save_pretrained(run / "step-3")
        (run / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3}')
    dist.barrier()


def main(root: Path) -> None:
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    if dist.get_rank() == 0:
        for tie in FAMILIES:
            save_tokenizer(save(model_of(tie), root / f"base-{tie}"))
    for tie, stage in (("tied", 1), ("tied", 2), ("tied", 3), ("untied", 3)):
        write_zero(root, tie, stage)
        if (tie, stage) in (("tied", 1), ("untied", 3)):
            write_universal(root, tie, stage)
    for tie in FAMILIES:
        write_fsdp(root, tie, (2,))
        write_dcp(root, tie)
    write_fsdp(root, "tied", (2, 1))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(Path(sys.argv[1]))
