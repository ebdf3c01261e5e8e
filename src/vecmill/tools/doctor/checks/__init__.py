"""One file for each check: a function from the round's context to a finding, and apart from it what it judges by."""
