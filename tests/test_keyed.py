from __future__ import annotations

import numpy as np
import pytest
import torch

from clp_lightning.keyed import generator, philox, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # The known answers that come with Random123, the authors' own library.
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = philox(tuple(np.uint64([w]) for w in counter), tuple(np.uint64([w]) for w in key))  # type: ignore[arg-type]
    assert [int(word[0]) for word in words] == expected  # type: ignore[index]


def test_uniforms_are_uniform_and_independent() -> None:
    ids, sample = torch.arange(500).repeat_interleave(8), torch.arange(8).repeat(500)
    u = torch.stack([uniforms(0, epoch, ids, sample, 5) for epoch in range(5)])  # (5, 4000, 5)
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    expected = u.numel() / 100
    assert 60 < ((counts - expected) ** 2 / expected).sum() < 145  # chi-square, 99 dof: 4 sigma
    # Neighbours in every part of the key are uncorrelated: 4 standard errors each.
    centred = (u - 0.5).reshape(5, 500, 8, 5) * 12**0.5
    for axis in range(4):
        pairs = centred.narrow(axis, 0, u.shape[0] - 1 if axis == 0 else centred.shape[axis] - 1)
        follow = centred.narrow(axis, 1, pairs.shape[axis])
        assert (pairs * follow).mean().abs() < 4 / pairs.numel() ** 0.5


def test_rows_depend_on_their_own_key() -> None:
    ids, sample = torch.tensor([3, 3, 2**31, 2**33 + 3]), torch.tensor([0, 1, 0, 0])
    all_at_once = uniforms(1, 2, ids, sample, 7)
    for row in range(4):
        alone = uniforms(1, 2, ids[row : row + 1], sample[row : row + 1], 7)
        assert torch.equal(alone[0], all_at_once[row])
        assert torch.equal(uniforms(1, 2, ids, sample, 3)[row], all_at_once[row, :3])
    assert len(all_at_once.unique()) == 28
    for other in [(0, 2), (1, 3)]:
        assert (uniforms(*other, ids, sample, 7) != all_at_once).all()
    assert uniforms(1, 2, ids[:0], sample[:0], 7).shape == (0, 7)


def test_generator_by_key() -> None:
    def draw(*key: int) -> float:
        return torch.rand((), generator=generator(*key)).item()

    assert draw(0, 1) == draw(0, 1)
    assert len({draw(0), draw(0, 0), draw(0, 1), draw(1, 0), draw(1)}) == 5
