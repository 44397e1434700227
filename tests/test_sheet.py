"""Sheets: every picture whole and in its place, grey everywhere else."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tc_deploy.sheet import GAP, GREY, sheet_of

SIZE = st.integers(1, 5)
CHANNELS = st.sampled_from([(), (3,)])


@given(count=st.integers(1, 12), columns=st.none() | SIZE, height=SIZE, width=SIZE, channels=CHANNELS)
def test_every_picture_is_in_its_place(
    count: int, columns: int | None, height: int, width: int, channels: tuple[int, ...]
) -> None:
    images = np.random.default_rng(0).integers(0, 100, (count, height, width, *channels)).astype(np.uint8)
    sheet = sheet_of(images, columns)
    across = columns or int(np.ceil(np.sqrt(count)))
    assert (sheet.shape[0] + GAP) % (height + GAP) == 0
    assert sheet.shape[1] == across * (width + GAP) - GAP
    rest = sheet.copy()
    for index, image in enumerate(images):
        top, left = index // across * (height + GAP), index % across * (width + GAP)
        place = (slice(top, top + height), slice(left, left + width))
        assert np.array_equal(sheet[place], image)
        rest[place] = GREY
    assert (rest == GREY).all()


def test_one_picture_is_its_own_sheet() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(1, 3, 4)
    assert np.array_equal(sheet_of(image), image[0])
