"""Ray: thin actors around worker and learner, supervision, weight broadcast. The only package that imports ray."""
