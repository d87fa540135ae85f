"""FIMI's problem: who gets how much synthetic data, at which CPU frequency, bandwidth and power, for least energy.

The method is that of arXiv 2310.13981 (IEEE TMC, doi 10.1109/TMC.2024.3371772). The body of the paper was not available
to us: it has a learning curve, a time split per device, convex inner problems and a cross-entropy search outside of
them; the formulas here are our reconstruction with the standard models of Yang et al. (arXiv 1911.02417). numpy and
scipy only; no Ray, no torch.

Problem (P1), over D_i (local and synthetic samples), f_i, b_i, p_i and the time split rho_i of each device i:

    minimise    sum_i  eps_i k_i D_i f_i^2  +  p_i S / r_i,    k_i = tau c_i,  r_i = b_i log2(1 + p_i h_i / (N0 b_i))
    subject to  sum_i w_i (alpha (D_loc_i + q (D_i - D_loc_i))^-beta + gamma) <= Delta_max
                k_i D_i / f_i <= rho_i T_max,   S / r_i <= (1 - rho_i) T_max,   sum_i b_i <= B
                f_min_i <= f_i <= f_max_i,   0 < p_i <= p_max_i,   D_loc_i <= D_i <= D_loc_i + D_gen_max
"""
