"""What goes into the page's blocks comes out of them unchanged."""

import base64
import json
import zlib

import numpy as np
import pytest

from apportion.features.geometry import NearestFeatures
from apportion.report import ReportData
from apportion.report.payload import CHUNK_FEATURES, blocks, decode_block, encode_block, readable
from made_up_report import made_up_contexts, made_up_report


def test_a_block_round_trips_arrays_and_text():
    arrays = {
        "bytes": np.arange(3, dtype=np.uint8),
        "words": np.arange(5, dtype=np.uint16),
        "floats": np.array([1.5, -2], dtype=np.float32),
        "big": np.array([1, 2], dtype=">i4"),
        "none": np.zeros(0, dtype=np.float64),
    }
    found, plain = decode_block(encode_block(arrays, ["</script>", {"a": None}]))
    assert plain == ["</script>", {"a": None}]
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_every_array_begins_where_a_typed_array_may():
    raw = zlib.decompress(base64.b64decode(encode_block({str(n): np.zeros(n, np.uint8) for n in range(9)})))
    size = int.from_bytes(raw[:4], "little")
    offsets = [4 + size + offset for _, offset, _ in json.loads(raw[4 : 4 + size])["arrays"].values()]
    assert all(offset % 8 == 0 for offset in offsets)


def test_a_block_holds_nothing_that_html_could_read():
    assert set(encode_block({}, "</script><!--" * 50)) <= set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("plain", "plain"), ("\ud800", "�"), ("a\udc00b", "a�b"), ("\ud83d\ude00", "😀"), ("😀", "😀"), ("\x00", "\x00")],
)
def test_lone_surrogates_are_replaced_and_pairs_joined(text, expected):
    assert readable(text) == expected


def test_windows_share_their_text_and_read_back_as_they_were():
    data = made_up_report(200, [f"w{i}" for i in range(50)])
    packed = {name: decode_block(block) for name, block in blocks(data)}
    ids = packed["vocabulary"][0]["id"]
    text = ids[packed["corpus"][0]["tokens"]]
    windows = packed["windows"][0]
    slots, width = data.contexts.token_ids.shape[1:]
    assert len(text) < data.contexts.token_ids.size / 3
    for feature in (0, 57, 128, 198, 199):
        chunk = packed[f"features-{feature // CHUNK_FEATURES}"][0]
        shares = chunk["shares"].reshape(-1, slots, width)[feature % CHUNK_FEATURES]
        for slot in range(slots):
            at = feature * slots + slot
            start, length = int(windows["start"][at]), int(windows["length"][at])
            expected = data.contexts.token_ids[feature, slot]
            assert text[start : start + length].tolist() == expected[expected >= 0].tolist()
            largest = float(data.contexts.max_activation[feature])
            np.testing.assert_allclose(
                shares[slot] / 65535 * largest, data.contexts.activations[feature, slot], atol=largest / 65535
            )


def test_contradicting_windows_are_refused():
    contexts = made_up_contexts(20, 5)
    contexts.token_ids[3, 1, 0] = 4 if contexts.token_ids[3, 1, 0] != 4 else 3
    contexts.position[4, 0] = contexts.position[3, 1]
    with pytest.raises(ValueError, match="disagree"):
        list(blocks(ReportData(title="x", contexts=contexts)))


def test_parts_about_another_dictionary_are_refused():
    contexts = made_up_contexts(20, 5)
    other = NearestFeatures(np.zeros((7, 2), np.int32), np.zeros((7, 2), np.float32))
    with pytest.raises(ValueError, match="nearest is about 7 features but contexts is about 20"):
        ReportData(title="x", contexts=contexts, nearest=other)
    with pytest.raises(ValueError, match="labels names feature 20"):
        ReportData(title="x", contexts=contexts, labels={20: "beyond"})
