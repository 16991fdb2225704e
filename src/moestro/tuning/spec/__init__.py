"""What is tuned, in the caller's words: buckets, specifications, profiles, runners, keys, the policy."""
