"""The torch side of `curvature.py`: PyHessian's formulas, in a process of its own that is idle while the other side runs.

PyHessian (Yao et al. 2020, arXiv 1912.07145) differentiates a gradient whose graph is kept, once for each product. Its package is
written for an older torch, so the formulas stand here. One JSON request a line, one JSON line for an answer.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import peers
import torch


class Peer:
    """A network's loss on one batch, with the graph of its gradient."""

    def __init__(self, model: str, given: dict, images: str, labels: str, weights: str, double: bool, seed: int):
        torch.manual_seed(seed)
        built = peers.Peer(model, given, images, labels, weights)
        network = built.networks["" if model == "resnet" else "eager"]
        self.inner = network if model == "resnet" else network.network
        self.dtype = torch.float64 if double else torch.float32
        network = network.to(self.dtype).requires_grad_(True)
        self.names = [name for name, _ in self.inner.named_parameters()]
        self.leaves = [leaf for _, leaf in self.inner.named_parameters()]
        loss = torch.nn.functional.cross_entropy(network(built.images.to(self.dtype)), built.labels)
        self.loss = float(loss.detach())
        self.gradient = torch.autograd.grad(loss, self.leaves, create_graph=True)

    def read(self, path: str) -> list[torch.Tensor]:
        """A vector under the names of the parameters."""
        arrays = np.load(path)
        names = {name.removeprefix("module."): name for name in arrays.files}
        return [torch.from_numpy(arrays[names[name]]).to(self.dtype) for name in self.names]

    def product(self, vector: list[torch.Tensor]) -> list[torch.Tensor]:
        """The Hessian times a vector."""
        return torch.autograd.grad(self.gradient, self.leaves, grad_outputs=vector, retain_graph=True)

    def quadratic_forms(self, vectors: list[str]) -> dict:
        """`v'Hv` of each vector."""
        found = []
        for path in vectors:
            vector = self.read(path)
            found.append(float(_dot(vector, self.product(vector))))
        return {"values": found, "loss": self.loss}

    def lanczos(self, start: str, steps: int, top: int) -> dict:
        """Eigenvalues of largest magnitude by Lanczos with full reorthogonalisation, with their true residuals."""
        basis, matrix = [_unit(self.read(start))], np.zeros((steps, steps))
        for step in range(steps):
            image = self.product(basis[step])
            for _ in range(2):
                for row, vector in enumerate(basis):
                    share = float(_dot(image, vector))
                    matrix[row, step] += share
                    image = [part - share * v for part, v in zip(image, vector, strict=True)]
            length = float(_norm(image))
            if step + 1 < steps:
                matrix[step + 1, step] = length
                basis.append([part / length for part in image])
        # The shares of the second round are in it too: symmetric but for rounding.
        values, coefficients = np.linalg.eigh(np.triu(matrix) + np.triu(matrix, 1).T)
        chosen = np.argsort(-np.abs(values))[:top]
        residuals = []
        for index in chosen:
            vector = [
                sum(c * v for c, v in zip(coefficients[:, index], parts, strict=True))
                for parts in zip(*basis, strict=True)
            ]
            residuals.append(_residual(self.product(vector), vector, values[index]))
        return {"values": values[chosen].tolist(), "residuals": residuals}

    def eigenvalues(self, starts: list[str], tolerance: float, steps: int, rule: str, products: int) -> dict:
        """Power iteration with deflation from these starts; the true residuals are not timed.

        Args:
          starts: files, one for each eigenvalue.
          tolerance: relative.
          steps: products at most, for each.
          rule: `quotient` ends at two quotients in a row that are this near, and returns the one before with the vector after:
            PyHessian's. `residual` is the same loop, ended by the true residual of the vector: a tenth of the tolerance for
            all but the last, because deflation hands their errors on; or where those errors are all that is left of it.
          products: at most, for all together.
        """
        begin, applied = time.perf_counter(), 0
        values, vectors = [], []
        for path in starts:
            vector, value = _unit(self.read(path)), None
            for _ in range(steps):
                if applied == products:
                    break
                vector = _unit(_outside(vector, vectors))
                image = self.product(vector)
                applied += 1
                quotient = float(_dot(image, vector))
                if rule == "residual":
                    value = quotient
                    enough = tolerance * abs(quotient) * (1.0 if path == starts[-1] else 0.1)
                    deflated = _residual(_outside(image, vectors), vector, quotient)
                    if min(_residual(image, vector, quotient), 10 * deflated) <= enough:
                        break
                elif value is not None and abs(value - quotient) / (abs(value) + 1e-6) < tolerance:
                    vector = _unit(image)
                    break
                value, vector = quotient, _unit(image)
            if value is None:
                break  # Nothing is left of the products for this one.
            values.append(value)
            vectors.append(vector)
        seconds = time.perf_counter() - begin
        residuals = [
            _residual(self.product(vector), vector, value) for value, vector in zip(values, vectors, strict=True)
        ]
        return {"values": values, "residuals": residuals, "products": applied, "seconds": seconds}

    def signs(self, seed: int, count: int) -> dict:
        """`v'Hv` of so many vectors of random signs: the terms of Hutchinson's trace."""
        generator = torch.Generator().manual_seed(seed)
        found = []
        for _ in range(count):
            vector = [
                torch.randint(0, 2, leaf.shape, generator=generator).to(self.dtype) * 2 - 1 for leaf in self.leaves
            ]
            found.append(float(_dot(vector, self.product(vector))))
        return {"values": found}


def _dot(left, right) -> torch.Tensor:
    return sum((a * b).sum() for a, b in zip(left, right, strict=True))


def _norm(vector) -> torch.Tensor:
    return _dot(vector, vector) ** 0.5


def _residual(image, vector, value: float) -> float:
    return float(_norm([part - value * v for part, v in zip(image, vector, strict=True)]))


def _unit(vector) -> list[torch.Tensor]:
    length = _norm(vector) + 1e-6  # As there.
    return [part / length for part in vector]


def _outside(vector, others) -> list[torch.Tensor]:
    for other in others:
        share = _dot(vector, other)
        vector = [part - share * o for part, o in zip(vector, other, strict=True)]
    return list(vector)


def _answer(request: dict, held: dict) -> dict:
    do = request.pop("do")
    if do == "version":
        return {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if do == "build":
        held["peer"] = Peer(**request)
        return {"loss": held["peer"].loss}
    return getattr(held["peer"], do)(**request)


def main() -> None:
    """Answers requests until the input ends."""
    held: dict = {}
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line), held)), file=answers, flush=True)


if __name__ == "__main__":
    main()
