import numpy as np
import pytest

from papers import PAPERS


@pytest.mark.parametrize('shape', [(1, 1), (1, 9), (3, 2), (40, 30)])
@pytest.mark.parametrize('paper', PAPERS)
def test_a_crop_of_any_size_is_laid_on_every_paper(paper, shape):
    ink = np.full(shape, 20, np.uint8)
    page = PAPERS[paper](ink)
    assert page.dtype == np.uint8
    assert page.shape[2:] in ((), (3,))
    assert all(side >= crop for side, crop in zip(page.shape, shape, strict=False))
    assert ink.min() == ink.max() == 20  # the crop itself is not changed
    np.testing.assert_array_equal(PAPERS[paper](ink), page)  # the same page for the same crop
