"""bitalloc: which bits and which rank for each matrix of a language model, under a byte budget.

The chain: retrieve -> calibrate -> sweep -> fit -> allocate -> compress -> evaluate -> analyze -> report. A module
is a stage; a folder is a family behind one registry: `quant`, `strategies`, `formats`, `suites`, `figures`,
`laws`, `analyses`, `documents`; or one subject: `config`, `tables`, `schemes`, `profile`, `fairness`. Stages meet in
the tables of `bitalloc.tables`.

Glossary, from the papers' symbols to names in the code:

    W                   `W_OI`, a matrix of O outputs and I inputs: y = W x
    H = E[x x^T]        `H_II`, second moment of a site's input          (GPTQ; CALDERA; QuIP#)
    lambda              `damping` x mean diagonal of H
    M M^T = H + lambda I  `Order.M_II`: error feedback and whitening in one factor
    Q                   codes, scales and zeros of a `CompressedMatrix`
    L R                 `L_OR`, `R_RI`, its low-rank part                (CALDERA; QERA)
    E = W - Q - L R     the error; `rel_error` = tr(E H E^T) / tr(W H W^T)
    b, r, g             `bits`, `rank`, `group_size` of an `Option`
    c_i                 `coefficient`: nats a token of KL for each unit of rel_error
    s_i, beta, delta    parameters of the error law in the table `law`
    plan                a table with one option for each matrix
"""
