"""A checkpoint is data, wherever it lies: no code that stands in one is run."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning import CLPModule, SteerablePolicy
from tests.runs import make_data, make_module, make_trainer


class Harmful:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path, Path]]:
    """Address and path of a harmful checkpoint, and the file that shows that it was unpickled."""
    file, trace = tmp_path / "harmful.ckpt", tmp_path / "it ran"
    torch.save({"state_dict": {}, "harm": Harmful(trace)}, file)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/harmful.ckpt", file, trace
        server.shutdown()


def load(path: Any, base: Path, folder: Path) -> None:
    CLPModule.load_from_checkpoint(path)


def validate(path: Any, base: Path, folder: Path) -> None:
    make_trainer(folder).validate(make_module(base), make_data(folder), ckpt_path=path)


def fit(path: Any, base: Path, folder: Path) -> None:
    make_trainer(folder).fit(make_module(base), make_data(folder), ckpt_path=path)


def steer(path: Any, base: Path, folder: Path) -> None:
    SteerablePolicy.from_pretrained(path)


@pytest.mark.parametrize("remote", [False, True], ids=["file", "address"])
@pytest.mark.parametrize("use", [load, validate, fit, steer])
def test_it_is_refused(
    use: Callable[..., None],
    remote: bool,
    served: tuple[str, Path, Path],
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "downloads"))
    address, file, trace = served
    message = "There is no policy at" if remote and use is steer else "is not unpickled"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        use(address if remote else file, tiny_folder(), tmp_path)
    assert not trace.exists()
