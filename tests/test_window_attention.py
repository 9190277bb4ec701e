from __future__ import annotations

import itertools
import math

import pytest
import torch

from nnunetv2_vf.window_attention import SwinBlock, WindowAttention, merge, partition, relative_position_index

HEADS, DIM = 2, 6


def attend_in_loops(attention: WindowAttention, x: torch.Tensor) -> torch.Tensor:
    """Compute window attention of one map (D, H, W, C) with loops over windows, heads and pairs of tokens."""
    w = attention.window_size
    size = x.shape[:3]
    window = [min(w, side) for side in size]
    shift = w // 2 if attention.shifted and min(size) > w else 0
    padded = [math.ceil(side / length) * length for side, length in zip(size, window, strict=True)]

    windows: dict[tuple, list[tuple]] = {}
    for token in itertools.product(*map(range, padded)):
        moved = [(t - shift) % side for t, side in zip(token, padded, strict=True)]
        windows.setdefault(tuple(m // length for m, length in zip(moved, window, strict=True)), []).append(token)

    def features(token):
        inside = all(t < side for t, side in zip(token, size, strict=True))
        return x[token] if inside else torch.zeros(DIM)

    def wrapped_axes(token):  # axes along which the cyclic shift moved the token from the beginning to the end
        return [t < shift for t in token]

    result = torch.zeros_like(x)
    d = DIM // HEADS
    for tokens in windows.values():
        query, key, value = torch.stack([attention.qkv(features(token)) for token in tokens]).chunk(3, dim=-1)
        for i, a in enumerate(tokens):
            if any(t >= side for t, side in zip(a, size, strict=True)):
                continue
            heads = []
            for head in range(HEADS):
                part = slice(head * d, (head + 1) * d)
                logits = []
                for j, b in enumerate(tokens):
                    at = [((p - shift) % side, (q - shift) % side) for p, q, side in zip(a, b, padded, strict=True)]
                    z, y, x_ = (p % length - q % length + w - 1 for (p, q), length in zip(at, window, strict=True))
                    row = (z * (2 * w - 1) + y) * (2 * w - 1) + x_
                    apart = -100.0 if wrapped_axes(a) != wrapped_axes(b) else 0.0
                    bias = attention.position_bias[row, head]
                    logits.append(query[i, part] @ key[j, part] / math.sqrt(d) + bias + apart)
                heads.append(torch.stack(logits).softmax(0) @ value[:, part])
            result[a] = attention.projection(torch.cat(heads))
    return result


def new_attention(window_size: int, shifted: bool) -> WindowAttention:
    attention = WindowAttention(DIM, HEADS, window_size, shifted)
    torch.nn.init.normal_(attention.position_bias)
    return attention


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("window_size", "size"),
    [
        (2, (4, 4, 4)),
        (2, (3, 5, 4)),  # padded along two axes
        (3, (4, 7, 5)),  # padded along all
        (3, (3, 6, 4)),  # as long as a window along one axis: no shift
        (3, (2, 7, 4)),  # shorter than a window along one axis
        (4, (1, 2, 3)),  # shorter along all
    ],
)
@torch.no_grad()
def test_window_attention_agrees_with_plain_loops(window_size, size, shifted):
    torch.manual_seed(sum(size))
    attention = new_attention(window_size, shifted)
    x = torch.randn(2, *size, DIM)
    expected = torch.stack([attend_in_loops(attention, sample) for sample in x])
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_shifted_windows_do_not_connect_opposite_ends_of_a_map():
    attention = new_attention(4, shifted=True)
    x = torch.randn(1, 8, 8, 8, DIM)
    changed = x.clone()
    changed[:, 0] += 5
    difference = (attention(changed) - attention(x)).abs().amax(dim=(0, 2, 3, 4))
    assert difference[:2].min() > 1e-3  # shifted windows: 0-1, 2-5, 6-7
    assert difference[2:].max() < 1e-6


def test_merge_undoes_partition():
    x = torch.randn(2, 4, 6, 10, 3)
    windows = partition(x, (2, 3, 5))
    assert windows.shape == (2, 2 * 2 * 2, 30, 3)
    assert torch.equal(merge(windows, (4, 6, 10), (2, 3, 5)), x)


def test_every_offset_has_its_own_row_in_the_bias_table():
    index = relative_position_index(3)
    rows = {}
    for token in itertools.product(range(3), repeat=6):
        offset = tuple(a - b for a, b in zip(token[:3], token[3:], strict=True))
        assert rows.setdefault(offset, index[token].item()) == index[token].item()
    assert sorted(rows.values()) == list(range(5**3))


def test_the_position_index_is_not_in_the_state_dict():
    assert set(new_attention(3, True).state_dict()) == {
        "qkv.weight",
        "qkv.bias",
        "projection.weight",
        "projection.bias",
        "position_bias",
    }


def test_dropout_and_stochastic_depth_are_off_in_evaluation():
    torch.manual_seed(0)
    block = SwinBlock(DIM, HEADS, 2, shifted=True, dropout=0.5, drop_path=0.5)
    x = torch.randn(4, 4, 4, 4, DIM)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))
