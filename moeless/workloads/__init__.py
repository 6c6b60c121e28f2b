"""Who asks, when, how much: prompts, arrivals, lengths, schedulers.

series = arrivals.load("azure-like", num_requests=200)      # or poisson:5, or a request trace's file
work = lengths.join(series, trace.requests, trace.num_tokens)
scheduler = schedulers.build("continuous", work.requests, num_ranks=8)
while not scheduler.done:
    iteration = scheduler.next(now)         # None: nothing to do before scheduler.next_arrival(now)
    rows = work.rows(iteration.spans)       # the trace's row of each token
    ...
    scheduler.complete(iteration, now)
"""
