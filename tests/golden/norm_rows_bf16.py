@T.prim_func(s_tir=True)
def norm_rows(x_h: T.handle("uint16"), y_h: T.handle("uint16"), weight_h: T.handle("uint16"), bias_h: T.handle("uint16"), eps_h: T.handle("float32"), M: T.int64, N: T.int64, x_stride: T.int64):
    T.func_attr({"tirx.noalias": True, "global_symbol": "norm_rows"})
    x = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=x_h, align=2)
    y = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=y_h, align=2)
    weight = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=weight_h, align=2)
    bias = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=bias_h, align=2)
    eps = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=eps_h, align=4)
    T.attr(T.int32(0), "device_id", 0)
    T.attr(T.int32(0), "device_type", 1)
    for m in range(M):
        at_at = T.alloc_buffer((1,), "int64", scope="global")
        at_at[0] = m * x_stride
        at: T.let = at_at[0]
        wide_1 = T.alloc_buffer((4,), "float32", scope="global")
        narrow_1 = T.alloc_buffer((1,), "float32", scope="global")
        wide_1[T.ramp(0, 1, 4)] = T.broadcast(T.float32(0), 4)
        narrow_1[0] = T.float32(0)
        for v in range(N // 4):
            n_2: T.let = v * 4
            d_3: T.let = T.reinterpret("float32x4", T.shift_left(T.Cast("uint32x4", x[T.ramp(at + n_2, 1, 4)]), T.broadcast(T.uint32(16), 4)))
            wide_1[T.ramp(0, 1, 4)] = wide_1[T.ramp(0, 1, 4)] + d_3 * d_3
        for v in range(N % 4):
            n_4: T.let = N // 4 * 4 + v
            d_5: T.let = T.reinterpret("float32", T.shift_left(T.Cast("uint32", x[at + n_4]), T.uint32(16)))
            narrow_1[0] = narrow_1[0] + d_5 * d_5
        half_6: T.let = wide_1[T.ramp(0, 1, 4)]
        half_7: T.let = T.Shuffle([half_6], [0, 1]) + T.Shuffle([half_6], [2, 3])
        sum_8: T.let = T.Shuffle([half_7], [0]) + T.Shuffle([half_7], [1]) + narrow_1[0]
        scale_9: T.let = T.float32(1) / T.sqrt(sum_8 / T.Cast('float32', N) + eps[0])
        for v in range(N // 4):
            n_10: T.let = v * 4
            d_11: T.let = T.reinterpret("float32x4", T.shift_left(T.Cast("uint32x4", x[T.ramp(at + n_10, 1, 4)]), T.broadcast(T.uint32(16), 4)))
            bits_12: T.let = T.reinterpret("uint32x4", d_11 * T.broadcast(scale_9, 4))
            rounded_13: T.let = T.shift_right(bits_12 + T.broadcast(T.uint32(32767), 4) + T.bitwise_and(T.shift_right(bits_12, T.broadcast(T.uint32(16), 4)), T.broadcast(T.uint32(1), 4)), T.broadcast(T.uint32(16), 4))
            rounded_14: T.let = T.reinterpret("float32x4", T.shift_left(T.Cast("uint32x4", T.Cast("uint16x4", T.Select(T.bitwise_and(bits_12, T.broadcast(T.uint32(2147483647), 4)) > T.broadcast(T.uint32(2139095040), 4), T.broadcast(T.uint32(32704), 4), rounded_13))), T.broadcast(T.uint32(16), 4)))
            bits_15: T.let = T.reinterpret("uint32x4", rounded_14 * T.reinterpret("float32x4", T.shift_left(T.Cast("uint32x4", weight[T.ramp(n_10, 1, 4)]), T.broadcast(T.uint32(16), 4))))
            rounded_16: T.let = T.shift_right(bits_15 + T.broadcast(T.uint32(32767), 4) + T.bitwise_and(T.shift_right(bits_15, T.broadcast(T.uint32(16), 4)), T.broadcast(T.uint32(1), 4)), T.broadcast(T.uint32(16), 4))
            y[T.ramp(m * N + n_10, 1, 4)] = T.Cast("uint16x4", T.Select(T.bitwise_and(bits_15, T.broadcast(T.uint32(2147483647), 4)) > T.broadcast(T.uint32(2139095040), 4), T.broadcast(T.uint32(32704), 4), rounded_16))
        for v in range(N % 4):
            n_17: T.let = N // 4 * 4 + v
            d_18: T.let = T.reinterpret("float32", T.shift_left(T.Cast("uint32", x[at + n_17]), T.uint32(16)))
            bits_19: T.let = T.reinterpret("uint32", d_18 * scale_9)
            rounded_20: T.let = T.shift_right(bits_19 + T.uint32(32767) + T.bitwise_and(T.shift_right(bits_19, T.uint32(16)), T.uint32(1)), T.uint32(16))
            rounded_21: T.let = T.reinterpret("float32", T.shift_left(T.Cast("uint32", T.Cast("uint16", T.Select(T.bitwise_and(bits_19, T.uint32(2147483647)) > T.uint32(2139095040), T.uint32(32704), rounded_20))), T.uint32(16)))
            bits_22: T.let = T.reinterpret("uint32", rounded_21 * T.reinterpret("float32", T.shift_left(T.Cast("uint32", weight[n_17]), T.uint32(16))))
            rounded_23: T.let = T.shift_right(bits_22 + T.uint32(32767) + T.bitwise_and(T.shift_right(bits_22, T.uint32(16)), T.uint32(1)), T.uint32(16))
            y[m * N + n_17] = T.Cast("uint16", T.Select(T.bitwise_and(bits_22, T.uint32(2147483647)) > T.uint32(2139095040), T.uint32(32704), rounded_23))
