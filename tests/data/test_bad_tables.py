"""Whatever is in a table, it is read or refused by one short sentence that names it, and soon."""

import time

from .bad_tables import bad_tables, faults, refusal


def test_each_is_read_or_refused_by_one_sentence(tmp_path):
    read = refused = 0
    for path in bad_tables(tmp_path / "t", 160):
        started = time.process_time()
        sentence = refusal(path)
        assert faults(path, sentence) == [], sentence
        assert time.process_time() - started < 2, path
        read, refused = read + (sentence is None), refused + (sentence is not None)
    assert read > 10
    assert refused > 50
