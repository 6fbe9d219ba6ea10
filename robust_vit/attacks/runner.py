"""The host layer of attacks: many examples over a fixed number of slots, each refilled when its example is finished."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from robust_vit import errors, files, identities, loops, processes
from robust_vit import mesh as meshes
from robust_vit import programs as compiled
from robust_vit.attacks import evaluation, inputs, skeleton

PURPOSE = 0x61747461  # "atta": keeps the draws of attacks apart from those of everything else under the same seed.
Example = tuple[int, int, np.ndarray, int]  # position, row, image, label


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What `run` found, one row an example, in the order of the examples.

    Attributes:
      row: the id of the example.
      label: true class, or for a targeted attack the class to reach.
      success, prediction, loss, distance, forward_passes, backward_passes, vanished: as in `AttackResult`.
      images: what the attack returned, where `keep_images` was set.
      executed_forward_passes: of one image each, over all slots, idle ones included; a resumed run counts what was saved.
      executed_backward_passes: likewise. The useful ones are the sums of `forward_passes` and `backward_passes`.
    """

    row: Int[np.ndarray, " examples"]
    label: Int[np.ndarray, " examples"]
    success: Bool[np.ndarray, " examples"]
    prediction: Int[np.ndarray, " examples"]
    loss: Float[np.ndarray, " examples"]
    distance: Float[np.ndarray, " examples"]
    forward_passes: Int[np.ndarray, " examples"]
    backward_passes: Int[np.ndarray, " examples"]
    vanished: Int[np.ndarray, " examples"]
    images: Float[np.ndarray, "examples height width channels"] | None
    executed_forward_passes: int
    executed_backward_passes: int

    @property
    def useful(self) -> float:
        """The share of executed passes that belonged to an unfinished example."""
        useful = self.forward_passes.sum() + self.backward_passes.sum()
        return float(useful / max(1, self.executed_forward_passes + self.executed_backward_passes))

    def records(self) -> dict[str, np.ndarray]:
        """The per-example arrays by name, without images."""
        return {name: getattr(self, name) for name in ("row", "label", *_JUDGED)}


_JUDGED = ("success", "prediction", "loss", "distance", "forward_passes", "backward_passes", "vanished")
_IDENTIFYING = ("position", "row", "label", "pixels")  # `pixels` is a checksum.


def example_keys(seed: int, rows: jax.Array) -> jax.Array:
    """One typed key an example from (seed, "attack", row): the same for a row in any batch, order or process."""
    return _example_keys(jax.random.key(seed), jnp.asarray(rows, jnp.uint32))


@jax.jit
def _example_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(key, PURPOSE), rows)


def run(
    attack: skeleton.Attack,
    model: skeleton.Model,
    examples: Mapping[str, np.ndarray] | Iterable[Mapping[str, np.ndarray]],
    *,
    slots: int,
    seed: int = 0,
    stride: int | None = None,
    refill: bool = True,
    keep_images: bool = False,
    directory: pathlib.Path | str | None = None,
    mesh: Mesh | None = None,
) -> RunResult:
    """Attacks many examples with one compiled step over `slots` of them; a finished example gives its slot to the next.

    An example's bytes depend on itself, the seed, `slots` and `stride`, and not on its neighbours: they are the same with
    and without refilling, in any order, and after a kill.

    Args:
      attack: the attack.
      model: canonical pixels to logits.
      examples: `image` `[n, height, width, channels]` in [0, 1], `label` `[n]` and, where there is one, `row` `[n]` (ids,
        from which the keys are drawn; positions otherwise); or an iterable of such batches, of which `mask` False marks
        padding. A batch is read when a slot is free for it.
      slots: examples attacked at a time: the batch size of every pass.
      seed: of the draws.
      stride: evaluations between two looks at what is finished; a look costs a synchronisation with the device. None looks
        a hundred times in an attack that takes all its evaluations, and at most after every second.
      refill: False fills the slots only when all are free, as a plain loop over batches does.
      keep_images: return the adversarial images as well.
      directory: where to save finished examples, so that a killed run goes on from there; of several processes the first
        writes, and all read. Another attack, model or setting than the one that wrote it, or other examples, are a `UserError`.
        Those that are not given again are left out of the result.
      mesh: devices that share the slots, or None for JAX's default device; every process makes the same call.

    Raises:
      UserError: what `attacks.check_inputs` refuses, found before the first step by three forward passes of the slots, which are
        not counted; a loss that is not finite.
    """
    stride = _stride(attack, stride)
    if slots < 1 or stride < 1:
        raise errors.UserError(f"slots is {slots} and stride {stride}: expected whole numbers from 1.")
    store = _Store(directory, attack, model, {"slots": slots, "seed": seed, "stride": stride, "images": keep_images})
    stream = (example for example in _examples(examples, attack, model, slots, mesh) if store.lacks(example))
    pool = _Pool(attack, model, slots=slots, seed=seed, stride=stride, keep_images=keep_images, mesh=mesh)
    while True:
        if refill or pool.is_idle():
            pool.fill(stream)
        if pool.is_idle():
            break
        pool.advance()
        while len(pool.finished) >= slots:
            store.add(pool.judge())
    while pool.finished:
        store.add(pool.judge())
    return store.result()


def programs(
    attack: skeleton.Attack,
    model: skeleton.Model,
    images: jax.ShapeDtypeStruct,
    *,
    examples: int,
    stride: int | None = None,
) -> list[compiled.Program]:
    """The compiled programs of `run` with how often each runs at most, for planning.

    Args:
      attack: the attack.
      model: canonical pixels to logits; its arrays may be shapes.
      images: the shape of the slots.
      examples: how many there are.
      stride: as in `run`.
    """
    rounds = -(-examples // images.shape[0])
    stride = _stride(attack, stride)
    begin, state = skeleton.begin_program(attack, images)
    step = loops.plan(skeleton.by_device(skeleton.advance, images, model), state, stride, attack, model, donate=True)
    times = step.times * rounds * -(-attack.evaluations // stride)
    judge = skeleton.judge_program(attack, model, images, state)
    counted = ((begin, 2 * rounds), (step, times), (judge, rounds))
    return [dataclasses.replace(program, times=count) for program, count in counted]


def _stride(attack: skeleton.Attack, given: int | None) -> int:
    return max(2, attack.evaluations // 100) if given is None else given


class _Pool:
    """The slots, on the device, with the examples that sit in them, and the finished ones that wait to be judged."""

    def __init__(
        self, attack, model, *, slots: int, seed: int, stride: int, keep_images: bool, mesh: Mesh | None = None
    ):
        self.attack, self.model, self.mesh = attack, model, mesh
        self.slots, self.seed, self.stride, self.keep_images = slots, seed, stride, keep_images
        self.occupants: list[Example | None] = [None] * slots
        self.finished: list[tuple[Example, dict[str, np.ndarray]]] = []
        self.state: skeleton.State | None = None
        self.step = skeleton.advance
        self.executed = 0

    def is_idle(self) -> bool:
        return all(occupant is None for occupant in self.occupants)

    def fill(self, stream: Iterator[Example]) -> None:
        fresh = np.zeros(self.slots, bool)
        for slot in range(self.slots):
            if self.occupants[slot] is None:
                self.occupants[slot] = next(stream, None)
                fresh[slot] = self.occupants[slot] is not None
        if fresh.any():
            incoming = self._init(self.occupants)
            if self.state is None:
                self.state = incoming.replace(done=meshes.put_global(self.mesh, ~fresh))
                self.step = skeleton.by_device(skeleton.advance, self.state.images, self.model)
            else:
                self.state = _fill(self.state, incoming, fresh)

    def advance(self) -> None:
        self.state = loops.repeat(self.step, self.state, self.stride, self.attack, self.model, donate=True)
        self.executed += self.slots * self.stride
        done = meshes.fetch(self.state.done)
        ended = [slot for slot in range(self.slots) if done[slot] and self.occupants[slot] is not None]
        if ended:
            moving = {name: meshes.fetch(getattr(self.state, name)) for name in skeleton.JUDGED}
            for slot in ended:
                # Copies: a view of one slot would keep the state of all.
                kept = {name: np.array(array[slot]) for name, array in moving.items()}
                self.finished.append((self.occupants[slot], kept))
                self.occupants[slot] = None

    def judge(self) -> dict[str, np.ndarray]:
        """Results of the finished examples that have waited longest, judged in a batch of `slots`."""
        batch, self.finished = self.finished[: self.slots], self.finished[self.slots :]
        state = self._init([example for example, _ in batch])
        moving = {
            name: np.stack([values[name] for _, values in _padded(batch, self.slots)]) for name in skeleton.JUDGED
        }
        result = skeleton.finish(self.attack, self.model, state.replace(**meshes.put_global(self.mesh, moving)))
        found = {name: meshes.fetch(getattr(result, name))[: len(batch)] for name in _JUDGED}
        for name, column in (("position", 0), ("row", 1), ("label", 3)):
            found[name] = np.asarray([example[column] for example, _ in batch], np.int32)
        found["pixels"] = np.asarray([identities.checksum(example[2]) for example, _ in batch], np.uint32)
        if not np.isfinite(found["loss"]).all():
            rows = found["row"][~np.isfinite(found["loss"])]
            raise errors.UserError(
                f"the model's loss is not finite on {len(rows)} of {len(batch)} attacked images (row {rows[0]}): check the "
                "weights, and the precision that the model computes in."
            )
        if self.keep_images:
            found["images"] = meshes.fetch(result.images)[: len(batch)]
        # Every example's share of the executed passes is written with it, so that a resumed run can add them up.
        judged = self.slots * self.attack.against(self.model).judge_passes
        passes = np.asarray(self.attack.step_passes) * self.executed + np.asarray([judged, 0])
        found["executed"] = passes.astype(np.int64) * evaluation.passes(self.model)
        self.executed = 0
        return found

    def _init(self, occupants: list[Example | None]) -> skeleton.State:
        """A state of new arrays that holds these examples; an empty slot repeats one of them."""
        filler = next(occupant for occupant in occupants if occupant is not None)
        occupants = [occupant or filler for occupant in _padded(occupants, self.slots)]
        _, rows, images, labels = zip(*occupants, strict=True)
        given = np.asarray(rows, np.uint32), np.stack(images), np.asarray(labels, np.int32)
        rows, images, labels = meshes.put_global(self.mesh, given)
        state = skeleton.start(self.attack, example_keys(self.seed, rows), images, labels)
        return jax.tree.map(jnp.copy, state)


@functools.partial(jax.jit, donate_argnums=0)
def _fill(state: skeleton.State, incoming: skeleton.State, fresh: jax.Array) -> skeleton.State:
    return skeleton.select(fresh, incoming, state)


class _Store:
    """Finished examples: in memory, and in a directory where one is given, which all processes see and the first writes."""

    def __init__(self, directory, attack, model, settings: dict[str, Any]):
        self.parts: list[dict[str, np.ndarray]] = []
        self.directory = None if directory is None else pathlib.Path(directory)
        self.saved: dict[int, list[int]] = {}
        self.given = 0
        if self.directory is None:
            return
        told = {
            "attack": identities.describe(attack),
            "model": identities.checksum(str(identities.describe(model)).encode()),
        }
        settings = files.jsonable({**settings, **told})
        path = self.directory / "settings.json"
        if processes.is_first():
            self.directory.mkdir(parents=True, exist_ok=True)
        processes.barrier("the directory of an attack")
        processes.check_shared(self.directory)
        if processes.first_finds(path.exists):
            previous = files.read_json(path)
            changed = sorted(name for name in settings if settings[name] != previous.get(name))
            if changed:
                raise errors.UserError(
                    f"{self.directory} holds a run with another {' and '.join(changed)}: choose another directory, or remove it."
                )
        elif processes.is_first():
            files.write_json(path, settings)
        count = processes.first_finds(lambda: len(self._saved_parts()))
        for part in self._saved_parts()[:count]:
            self.parts.append(files.read_npz(part))
            columns = {name: array.tolist() for name, array in self.parts[-1].items() if name in _IDENTIFYING}
            examples = zip(*(columns[name] for name in _IDENTIFYING), strict=True)
            self.saved.update({position: example for position, *example in examples})

    def _saved_parts(self) -> list[pathlib.Path]:
        return sorted(self.directory.glob("part_*.npz"))

    def lacks(self, example: Example) -> bool:
        position, row, image, label = example
        self.given += 1
        if position not in self.saved:
            return True
        saved = self.saved[position]
        if saved != [row, label, identities.checksum(image)]:
            pixels = " of other pixels" if saved[:2] == [row, label] else ""
            raise errors.UserError(
                f"{self.directory} holds a run over other examples (number {position} is row {row} with label {label}, and was "
                f"row {saved[0]} with label {saved[1]}{pixels}): choose another directory, or remove it."
            )
        return False

    def add(self, found: dict[str, np.ndarray]) -> None:
        if self.directory is not None and processes.is_first():
            taken = [int(part.stem.removeprefix("part_")) for part in self._saved_parts()]
            files.write_npz(self.directory / f"part_{max(taken, default=-1) + 1:05d}.npz", found)
        self.parts.append(found)

    def result(self) -> RunResult:
        if not self.given:
            raise errors.UserError("there are no examples to attack: the images are empty, or all of them are masked.")
        executed = sum(part["executed"] for part in self.parts)
        names = [name for name in self.parts[0] if name not in ("executed", "pixels")]
        merged = {name: np.concatenate([part[name] for part in self.parts]) for name in names}
        position = merged.pop("position")
        order = np.argsort(position, kind="stable")
        ordered = {name: array[order[: self.given]] for name, array in merged.items()}
        return RunResult(
            **{"images": None, **ordered},
            executed_forward_passes=int(executed[0]),
            executed_backward_passes=int(executed[1]),
        )


def _examples(examples, attack, model, slots: int, mesh: Mesh | None) -> Iterator[Example]:
    position = 0
    for batch in [examples] if isinstance(examples, Mapping) else examples:
        images, labels = np.asarray(batch["image"]), np.asarray(batch["label"])
        rows = np.asarray(batch["row"]) if "row" in batch else np.arange(position, position + len(images))
        mask = np.asarray(batch["mask"], bool) if "mask" in batch else np.ones(len(images), bool)
        for name, array in (("mask", mask), ("row", rows)):
            if array.shape != images.shape[:1]:
                raise errors.UserError(f"{name} is {array.shape}: expected one number an image, ({len(images)},).")
        # Padding may be anything; labels of another length are refused as they are.
        real = slice(None) if mask.all() or labels.shape[:1] != mask.shape else mask
        inputs.check_values(model, images[real], labels[real])
        if position == 0 and mask.any():
            # As many images as there are slots, repeated if need be: the shape that the devices divide.
            chosen = np.resize(np.flatnonzero(mask), slots)
            targets = labels[chosen] if attack.goal is skeleton.TARGETED else None
            inputs.check_model(model, images[chosen], targets=targets, mesh=mesh)
        for index in np.flatnonzero(mask):
            yield position, int(rows[index]), images[index], int(labels[index])
            position += 1


def _padded(items: list, length: int) -> list:
    return items + [items[0]] * (length - len(items))
