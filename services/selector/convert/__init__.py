"""Between the contract and the domain: requests are checked, answers are written."""
