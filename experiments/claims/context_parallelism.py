"""What each method of context parallelism sends, counted in compiled programs."""

from experiments.claims import claim, collective_bytes

H, K, V = 2, 32, 32
RANKS, TOKENS = (4, 8, 16), (64, 128, 256)  # tokens per rank
STATES = ("LASP-1", "ZeCO", "LASP-2", "KCP")
# Numbers that each rank receives in the forward pass, by the papers.
PUBLISHED = {
    "LASP-1": lambda W, L: H * K * V,
    "ZeCO": lambda W, L: H * K * V,
    "LASP-2": lambda W, L: (W - 1) * H * K * V,
    "KCP": lambda W, L: (W - 1) * H * (K * V + K * K),
    "Ring Attention": lambda W, L: (W - 1) * L * H * (K + V),
    "LASP-2H": lambda W, L: (W - 1) * L * H * (K + V),
}
LABELS = {
    "LASP-1": "LASP-1: linear, ring",
    "ZeCO": "ZeCO: linear, all-scan",
    "LASP-2": "LASP-2: linear, all-gather",
    "KCP": "KCP: delta rule, all-gather",
    "Ring Attention": "Ring Attention: softmax",
    "LASP-2H": "LASP-2H: softmax, all-gather",
}
# What is sent beside, and the numbers it takes: LASP-2's states have no decay, and the papers do
# not count positions.
EXTRA = {
    "LASP-2": ("a total decay per head", lambda W, L: (W - 1) * H),
    "Ring Attention": ("16 bytes per key for its position", lambda W, L: (W - 1) * L * 4),
}


def run(context):
    sizes = [(W, TOKENS[0]) for W in RANKS] + [(RANKS[0], L) for L in TOKENS[1:]]
    if context.smoke:
        sizes = [(2, 8)]
    cases = [
        {"method": method, "W": W, "L": L, "H": H, "K": K, "V": V}
        for method in PUBLISHED
        for W, L in sizes
    ]
    return {"cases": collective_bytes.measure(cases)}


def judge(measured):
    checks = []
    for method in PUBLISHED:
        cases = [case for case in measured["cases"] if case["method"] == method]
        off = [max(case["forward"]) - _expected(method, case) for case in cases]
        back = [max(case["backward"]) - _expected(method, case) for case in cases]
        extra = f", and {EXTRA[method][0]}" if method in EXTRA else ""
        checks.append(
            claim.Check(
                f"{method} sends what its paper says, forward{extra}",
                not any(off),
                f"{max(map(abs, off))} bytes off in {len(off)} programs",
                "0 bytes off",
            )
        )
        if method in STATES:
            checks.append(
                claim.Check(
                    f"{method} sends as much backward, for any number of tokens",
                    not any(back),
                    f"{max(map(abs, back))} bytes off in {len(back)} programs",
                    "0 bytes off",
                )
            )
    return checks


def _expected(method, case):
    sizes = case["W"], case["L"]
    extra = EXTRA[method][1](*sizes) if method in EXTRA else 0
    return 4 * (PUBLISHED[method](*sizes) + extra)


def draw(measured, figure):
    by_ranks, by_tokens = figure.subplots(1, 2, sharey=True)
    cases = measured["cases"]
    for number, method in enumerate(PUBLISHED):
        own = [case for case in cases if case["method"] == method]
        style = {"color": f"C{number}", "markersize": 13 - 2 * number, "marker": "os^vD*"[number]}
        for axes, letter, fixed, at in (
            (by_ranks, "W", "L", TOKENS[0]),
            (by_tokens, "L", "W", RANKS[0]),
        ):
            points = sorted((c[letter], max(c["forward"])) for c in own if c[fixed] == at) or [
                (1, 1)
            ]
            axes.plot(*zip(*points), **style, linestyle="none", label=LABELS[method])
            xs = [x for x, _ in points]
            paper = [4 * PUBLISHED[method](**{letter: x, fixed: at}) for x in xs]
            axes.plot(xs, paper, color=f"C{number}", linewidth=1)
    by_ranks.plot([], [], color="black", linewidth=1, label="the papers' formulas")
    by_ranks.set(
        xlabel=f"ranks ({TOKENS[0]} tokens on each)",
        ylabel="bytes that a rank receives, forward",
        xscale="log",
        yscale="log",
    )
    by_tokens.set(xlabel=f"tokens per rank ({RANKS[0]} ranks)", xscale="log")
    for axes, ticks in ((by_ranks, RANKS), (by_tokens, TOKENS)):
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)


CLAIM = claim.Claim(
    title="Over many devices linear attention sends states of one size; softmax attention sends all "
    "keys and values",
    paper="arXiv 2502.07563",
    section="section 3 and table of costs; LASP-1: arXiv 2404.02882, ZeCO: arXiv 2507.01004",
    published="Received by each of W ranks per layer, forward: LASP-1 B H d_k d_v, one hop after "
    "the other; LASP-2 (W-1) B H d_k d_v in one all-gather; ZeCO B H d_k d_v in an all-scan; "
    "flash-linear-attention's context parallelism of delta rules (W-1) B H (d_k d_v + d_k²); Ring "
    "Attention 2 (W-1)/W B N H d for N tokens. As much again backward.",
    ours=f"The operators of `kernels_pallas.context_parallel`, compiled with their gradients for 4 "
    f"to 16 simulated ranks (B = 1, H = {H}, d_k = d_v = {K}, float32); the collectives of the "
    "compiled programs are read and their bytes counted, of the rank that receives most. Nothing "
    "is trained or timed.",
    minutes=1.5,
    run=run,
    judge=judge,
    draw=draw,
    figure_size=(9.0, 4.5),
)
