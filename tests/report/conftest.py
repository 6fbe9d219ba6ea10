"""The fabricated study is known to the registry while a test of the report runs."""

from __future__ import annotations

import fabricated_study
import pytest

from robust_vit import report, studies


@pytest.fixture(autouse=True, scope="module")
def fabricated():
    """Registers the fabricated study."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(studies.STUDIES, fabricated_study.NAME, fabricated_study.ENTRY)
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two runs of one workdir: 90 % and 55 % right on the same 200 images. Not to be changed."""
    path = tmp_path_factory.mktemp("fabricated") / "work"
    for index, (name, rate) in enumerate((("resnet", 0.9), ("vit", 0.55))):
        fabricated_study.write(path / name, rate=rate, seed=index)
        fabricated_study.write_metrics(path / name)
    return path


@pytest.fixture(scope="module")
def page(workdir, fabricated):
    """The path of the report of `workdir`."""
    return report.write([workdir], workdir / "report")
