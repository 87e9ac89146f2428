"""On-policy rounds: sample answers, judge them, train on what the judge says, and again."""
