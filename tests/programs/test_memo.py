"""What is remembered of programs: for which, under which arguments, and for how long."""

import gc
import weakref

import torch

from pplvi.programs.memo import Memo, argument_shapes, dimensions


class Program:
    """A program that can be forgotten."""

    def __call__(self) -> None:
        """Nothing to run."""


def test_what_is_kept_belongs_to_the_programs_and_the_key() -> None:
    memo, model, guide = Memo[int](), Program(), Program()
    assert memo.keep((model, guide), "a", 1) == 1
    memo.keep((guide, model), "a", 2)
    memo.keep((model, guide), "b", 3)
    assert [memo.recall((model, guide), "a"), memo.recall((guide, model), "a"), memo.recall((model, guide), "b")] == [
        1,
        2,
        3,
    ]
    assert memo.recall((model, model), "a") is None
    assert memo.recall((model, guide), "c") is None


def test_programs_are_forgotten_with_either_of_a_pair() -> None:
    memo, model, guide = Memo[int](), Program(), Program()
    memo.keep((model, guide), None, 1)
    gone = weakref.ref(guide)
    del guide
    gc.collect()
    assert gone() is None
    again = Program()
    assert memo.recall((model, again)) is None


def test_programs_that_cannot_be_remembered_are_looked_at_anew() -> None:
    memo, unhashable = Memo[int](), [1]
    assert memo.keep((unhashable,), None, 1) == 1
    assert memo.recall((unhashable,)) is None


def test_a_column_is_no_vector_and_sizes_count_where_they_matter() -> None:
    vector, column = torch.zeros(3), torch.zeros(3, 1)
    assert dimensions((vector,), {}) != dimensions((column,), {})
    assert dimensions((vector,), {}) == dimensions((torch.zeros(5),), {})
    assert argument_shapes((vector,), {"x": 1}) == ((3,), None) != argument_shapes((torch.zeros(5),), {"x": 1})
