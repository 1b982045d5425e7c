"""One file a method: paper, formula, leaf, rules, transform."""
