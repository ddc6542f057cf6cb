"""Is the mask the published generator's, the same from kernels and PyTorch, and a function of the user alone?"""

import numpy as np
import pytest
import torch

from minipeft_kernels.dropout import keep_mask, philox
from minipeft_kernels.segments import Segments
from minipeft_kernels.wgrad import wgrad


def test_kernels_draw_the_mask_that_pytorch_draws(kernels):
    """Read off a weight gradient: with v the identity and x all ones, row r of the gradient is row r's mask."""
    drops = torch.tensor([[0, 128], [1, 26], [-5, 0], [123456789012345678, 255]])
    lengths, width = [17, 0, 5, 40], 270
    segments = Segments.build([3, 0, 2, 1], lengths, kernels)
    v = torch.cat([torch.eye(40)[:length] for length in lengths]).to(kernels)
    grad = torch.zeros(4, 40, width, device=kernels)
    wgrad(v, torch.ones(62, width, device=kernels), segments.plan, grad, drop=drops.to(kernels))
    keep, factor = keep_mask(drops, segments.starts, width)
    masks = torch.cat([grad[slot, :length] for slot, length in zip(segments.slots, lengths)])
    assert torch.equal(masks.cpu(), keep * factor)


def philox_by_definition(key, counter, rounds=7):
    """Salmon et al. 2011, section 3.3, in Python's own integers."""
    c, (k0, k1) = list(counter), (key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF)
    for _ in range(rounds):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(product1 >> 32) ^ c[1] ^ k0, product1 & 0xFFFFFFFF, (product0 >> 32) ^ c[3] ^ k1, product0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def test_words_are_philox():
    # The authors' known answer (Random123, kat_vectors: "philox4x32 7", all zeros), then the definition.
    assert philox_by_definition(0, [0] * 4) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    rng = np.random.default_rng(0)
    keys, c0, c1 = (torch.from_numpy(rng.integers(low, high, 50)) for low, high in
                    ((-(2**63), 2**63 - 1), (0, 2**32), (0, 2**32)))  # fmt: skip
    words = torch.stack(philox(keys, c0, c1), 1)
    for i in range(50):
        assert words[i].tolist() == philox_by_definition(int(keys[i]) % 2**64, [int(c0[i]), int(c1[i]), 0, 0])


@pytest.mark.parametrize("threshold", [0, 1, 26, 128, 255])
def test_as_many_are_dropped_as_asked_and_the_mean_is_kept(threshold):
    keep, factor = keep_mask(torch.tensor([[42, threshold]]), np.array([0, 400]), 500)
    p, n = threshold / 256, 200_000
    assert abs(1 - keep.float().mean().item() - p) <= 6 * (p * (1 - p) / n) ** 0.5
    assert float(factor[0]) == pytest.approx(1 / (1 - p))
    # neighbours in either direction do not know of each other
    if 0 < threshold < 255:
        x = (keep.double() - keep.double().mean()) / keep.double().std()
        for a, b in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (x[:, 16:], x[:, :-16])):
            assert abs(float((a * b).mean())) < 6 / n**0.5


def test_a_mask_is_a_function_of_key_and_position_in_the_segment():
    drops = torch.tensor([[1, 100], [2, 100]])
    keep, _ = keep_mask(drops, np.array([0, 30, 50]), 64)
    alone, _ = keep_mask(drops[1:], np.array([0, 20]), 64)
    assert torch.equal(keep[30:], alone) and not torch.equal(keep[:20], alone)
    shorter, _ = keep_mask(drops[1:], np.array([0, 7]), 64)
    assert torch.equal(alone[:7], shorter)
