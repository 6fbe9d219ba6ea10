"""What sharding costs and saves: bytes between devices against theory, memory of a ViT-H, weak scaling over processes.

    python tests/benchmarks/sharding.py traffic         collectives of one training step on 1 to 8 virtual devices
    python tests/benchmarks/sharding.py memory          what a device holds of a ViT-H/14 in training, whole and sharded
    python tests/benchmarks/sharding.py train           two real training steps of it, fully sharded over 8 virtual devices
    python tests/benchmarks/sharding.py scaling         images a second of 1 and 2 processes, the batch of each process fixed

Each prints a Markdown table. Results with hardware and versions: tests/benchmarks/results/sharding.md.
"""

from __future__ import annotations

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax

from robust_vit import collectives, mesh, programs, progress, runs, settings, train

ROOT = pathlib.Path(__file__).parents[2]
SCALING_CONFIG = """
from robust_vit import settings


def get_config():
    config = settings.default()
    config.data.update({"name": "textured_shapes/grey", "eval_batch": 64, "test_limit": 64})
    with config.unlocked():
        config.model = settings.model("vit", width=192, depth=2, heads=3, mlp_width=768, patch=4)
    config.train.steps = 24
    config.log_every = 4
    config.checkpoint.every_epochs = 1e9
    return config
"""


def _setup(count: int, sharding: str, model, *, batch: int, image_size: int | None = None) -> runs.Setup:
    config = settings.default()
    config.data.update({"name": "textured_shapes/grey", "batch": batch, "eval_batch": batch, "train_limit": 64})
    with config.unlocked():
        config.model = model
        if image_size:
            config.data.image_size = image_size
    config.sharding = sharding
    return runs.prepare(settings.resolve(config)["main"], tempfile.gettempdir(), "none", devices=jax.devices()[:count])


def _compiled(setup: runs.Setup):
    return programs.inspect(train.step_program(setup)).compiled


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.3f}"


def traffic() -> None:
    """Bytes of the collectives of one step of a ViT (width 256, depth 4), per device, beside what theory asks for."""
    model = settings.model("vit", width=256, depth=4, heads=4, mlp_width=1024, patch=4)
    print("| sharding | devices | all-gather, MB | theory | all-reduce, MB | theory | sent in a ring, MB a device |")
    print("|---|---|---|---|---|---|---|")
    for sharding in ("data", "fsdp", "fsdp=2", "fsdp=4"):
        for count in (1, 2, 4, 8):
            group = count if sharding == "fsdp" else int(sharding.partition("=")[2] or 1)
            if count % group or (sharding != "data" and count == 1) or (sharding[4:] and group >= count):
                continue
            setup = _setup(count, sharding, model, batch=128)
            found = [each for each in collectives.read(_compiled(setup)) if each.group > 1]
            params = jax.tree.leaves(setup.abstract_state().params)
            split = sum(leaf.size * 4 for leaf in params if not leaf.sharding.is_fully_replicated)
            whole = sum(leaf.size * 4 for leaf in params) - split
            gathered = sum(each.bytes * each.group * each.count for each in found if each.kind == "all-gather")
            reduced = sum(each.bytes * each.count for each in found if each.kind == "all-reduce")
            # The gradient; where it is sharded and there are several groups, each device's share of it once more between them.
            wanted = (split + whole) + (split / group if 1 < group < count else 0) if count > 1 else 0
            others = {each.kind for each in found} - {"all-gather", "all-reduce"}
            assert not others, others
            sent = sum(each.sent * each.count for each in found)
            numbers = (gathered, split if group > 1 else 0, reduced, wanted, sent)
            print(f"| {sharding} | {count} | {' | '.join(map(_megabytes, numbers))} |", flush=True)


def _huge(sharding: str, dtype: str, batch: int) -> runs.Setup:
    model = settings.model("vit", size="H", patch=14, scan=True, remat=True, dtype=dtype)
    return _setup(8, sharding, model, batch=batch, image_size=224)


def memory() -> None:
    """What XLA reserves on each of 8 devices for one step of ViT-H/14 at 224 px with AdamW, batch 16, bfloat16."""
    print("| sharding | state, GB a device | temporary, GB a device | together | compile, s |")
    print("|---|---|---|---|---|")
    for sharding in ("data", "fsdp=4", "fsdp"):
        setup = _huge(sharding, "bfloat16", 16)
        began = time.perf_counter()
        found = _compiled(setup).memory_analysis()
        seconds = time.perf_counter() - began
        state, temporary = found.argument_size_in_bytes / 1e9, found.temp_size_in_bytes / 1e9
        print(f"| {sharding} | {state:.2f} | {temporary:.2f} | {state + temporary:.2f} | {seconds:.0f} |", flush=True)


def train_huge() -> None:
    """Two real steps of ViT-H/14 (631 million parameters), float32, batch 8, fully sharded over 8 virtual devices."""
    setup = _huge("fsdp", "float32", 8)
    state = setup.fresh_state()
    held = mesh.bytes_per_device(state) / 1e9
    print(f"state: {held:.2f} GB a device of {8 * held:.2f} GB", flush=True)
    step, keys = train._compiled_step(setup), setup.keys("train")
    for index in range(2):
        batch = setup.bundle.train.batch(index)
        began = time.perf_counter()
        with mesh.context(setup.mesh):
            state = step(state, mesh.put_batch(setup.mesh, {name: batch[name] for name in ("image", "label")}), keys)
        loss = float(state.sums["loss"]) / (index + 1)
        print(f"step {index + 1}: mean loss {loss:.4f}, {time.perf_counter() - began:.0f} s", flush=True)


def scaling() -> None:
    """Images a second of the whole program, one core a process, 64 images a process and step; two interleaved rounds."""
    speeds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder) / "config.py"
        config.write_text(SCALING_CONFIG)
        for turn in range(3):
            for count in speeds:
                workdir = pathlib.Path(folder) / f"{count}_{turn}"
                command = [sys.executable, str(ROOT / "launch" / "local_processes.py"), f"--processes={count}"]
                command += [f"--config={config}", f"--workdir={workdir}", f"--config.data.batch={64 * count}"]
                environment = {**os.environ, "PYTHONPATH": str(ROOT)}
                environment.pop("JAX_NUM_CPU_DEVICES")
                # One process gets one core as well: what is measured is the exchange, not the cores.
                pinned = ["taskset", "-c", "0"] if count == 1 else []
                subprocess.run([*pinned, *command], env=environment, check=True, capture_output=True, timeout=300)
                lines = progress.read(workdir / "main" / "speed.jsonl")
                if turn:  # The first turn fills the compilation cache.
                    speeds[count].append(statistics.median(line["images_per_second"] for line in lines[1:]))
    print("| processes | images/s, median of rounds | each round | efficiency |")
    print("|---|---|---|---|")
    base = statistics.median(speeds[1])
    for count, found in speeds.items():
        middle = statistics.median(found)
        rounds = ", ".join(f"{value:.0f}" for value in found)
        print(f"| {count} | {middle:.0f} | {rounds} | {middle / base / count:.2f} |")


if __name__ == "__main__":
    {"traffic": traffic, "memory": memory, "train": train_huge, "scaling": scaling}[sys.argv[1]]()
