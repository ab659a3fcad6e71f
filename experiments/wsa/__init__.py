"""The first results of weight scope alignment: PLAN.md was written before they were made, RESULTS.md says what came."""
