"""The chunked logit lens against one matrix product and a sort."""

import numpy as np
import pytest
import torch

from apportion.features.logit_lens import logit_lens


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("gained", [False, True])
def test_lens_equals_a_full_sort_of_all_logits(chunk, gained):
    torch.manual_seed(0)
    decoder, unembedding, gain = torch.randn(23, 12), torch.randn(60, 12), torch.rand(12) + 0.5
    lens = logit_lens(decoder, unembedding, final_norm_weight=gain if gained else None, top=5, chunk=chunk)
    logits = (decoder @ (unembedding * (gain if gained else 1)).T).numpy()
    order = np.argsort(-logits, axis=1)
    assert (lens.promoted_ids == order[:, :5]).all()
    assert (lens.suppressed_ids == order[:, ::-1][:, :5]).all()
    np.testing.assert_allclose(lens.promoted_logits, np.take_along_axis(logits, order[:, :5], 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lens.suppressed_logits[:, 0], logits.min(1), rtol=1e-4, atol=1e-5)


def test_a_small_vocabulary_gives_all_of_it():
    lens = logit_lens(torch.eye(3), torch.eye(3), top=10)
    assert lens.promoted_ids.shape == (3, 3)
    assert lens.promoted_ids[:, 0].tolist() == [0, 1, 2]


def test_another_width_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"width 4 .* 3"):
        logit_lens(torch.zeros(2, 4), torch.zeros(9, 3))
