"""Drawing of cases: the factors of a target, a sample that covers pairs of them, and random cases by Hypothesis."""
