"""What training a Method takes in memory, predicted from shapes alone: no weights are read, and nothing trains."""
