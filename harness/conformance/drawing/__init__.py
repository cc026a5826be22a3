"""Drawing of cases: the factors of a target, a sample that covers pairs of factors, and random cases by Hypothesis."""
