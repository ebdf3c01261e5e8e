"""The checks, by what they look at: each a function `check_*` of the round, and apart from it a pure `judge_*`."""
