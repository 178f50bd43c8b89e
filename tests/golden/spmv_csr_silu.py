@T.prim_func(s_tir=True)
def spmv(x_h: T.handle("float32"), y_h: T.handle("float32"), bias_h: T.handle("float32"), ptr0_h: T.handle("int32"), idx0_h: T.handle("uint16"), val0_h: T.handle("float32"), N: T.int64, chunk: T.int64, C0: T.int64, P0: T.int64):
    T.func_attr({"tirx.noalias": True, "global_symbol": "spmv"})
    x = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=x_h, align=4)
    y = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=y_h, align=4)
    bias = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=bias_h, align=4)
    ptr0 = T.decl_buffer((T.int64(1) << T.int64(40),), "int32", data=ptr0_h, align=4)
    idx0 = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=idx0_h, align=2)
    val0 = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=val0_h, align=4)
    T.attr(T.int32(0), "device_id", 0)
    T.attr(T.int32(0), "device_type", 1)
    for task in T.parallel((N + chunk - 1) // chunk):
        first_at = T.alloc_buffer((1,), "int64", scope="global")
        first_at[0] = task * chunk
        first: T.let = first_at[0]
        last_at = T.alloc_buffer((1,), "int64", scope="global")
        last_at[0] = T.min(N, first + chunk)
        last: T.let = last_at[0]
        for n in range(last - first):
            y[first + n] = bias[first + n]
        for i in range((last - first + 0) // 1):
            parent0: T.let = first // 1 + i
            row_1: T.let = first + i * 1
            acc = T.alloc_buffer((4,), "float32", scope="global")
            acc[0] = T.float32(0)
            acc[1] = T.float32(0)
            acc[2] = T.float32(0)
            acc[3] = T.float32(0)
            lo0: T.let = T.Cast("int64", ptr0[parent0])
            count0: T.let = T.Cast("int64", ptr0[parent0 + T.int64(1)]) - lo0
            for j in range(count0 // 4):
                block_2: T.let = lo0 + j * 4 + 0
                xb_3: T.let = (T.Cast("int64", idx0[lo0 + j * 4 + 0])) * 1
                acc[0] = acc[0] + val0[block_2 * 1 + 0 * 1 + 0] * x[xb_3 + 0]
                block_4: T.let = lo0 + j * 4 + 1
                xb_5: T.let = (T.Cast("int64", idx0[lo0 + j * 4 + 1])) * 1
                acc[1] = acc[1] + val0[block_4 * 1 + 0 * 1 + 0] * x[xb_5 + 0]
                block_6: T.let = lo0 + j * 4 + 2
                xb_7: T.let = (T.Cast("int64", idx0[lo0 + j * 4 + 2])) * 1
                acc[2] = acc[2] + val0[block_6 * 1 + 0 * 1 + 0] * x[xb_7 + 0]
                block_8: T.let = lo0 + j * 4 + 3
                xb_9: T.let = (T.Cast("int64", idx0[lo0 + j * 4 + 3])) * 1
                acc[3] = acc[3] + val0[block_8 * 1 + 0 * 1 + 0] * x[xb_9 + 0]
            for j in range(count0 % 4):
                block_10: T.let = lo0 + count0 // 4 * 4 + j
                xb_11: T.let = (T.Cast("int64", idx0[lo0 + count0 // 4 * 4 + j])) * 1
                acc[0] = acc[0] + val0[block_10 * 1 + 0 * 1 + 0] * x[xb_11 + 0]
            acc[0] = acc[0] + acc[1]
            acc[0] = acc[0] + acc[2]
            acc[0] = acc[0] + acc[3]
            for b in range(T.min(T.int64(1), N - row_1)):
                y[row_1 + b] = y[row_1 + b] + acc[0 + b]
        for out in range(last - first):
            v_12: T.let = y[first + out]
            e_13: T.let = T.max(T.min(T.float32(0.0) - v_12, T.float32(89.0)), T.float32(-87.0))
            sum_14: T.let = T.call_llvm_pure_intrin("float32", "llvm.fmuladd", e_13, T.float32(1.4426950408889634), T.float32(12583039.0))
            n_15: T.let = sum_14 - T.float32(12583039.0)
            r_16: T.let = e_13 - n_15 * T.float32(0.693359375) + n_15 * T.float32(0.00021219444)
            power_17: T.let = T.reinterpret("float32", T.shift_left(T.reinterpret("int32", sum_14), T.int32(23)))
            p_18: T.let = T.float32(0.0013888889225199819) * r_16 + T.float32(0.008333350531756878)
            p_19: T.let = p_18 * r_16 + T.float32(0.04166654497385025)
            p_20: T.let = p_19 * r_16 + T.float32(0.1666666716337204)
            p_21: T.let = p_20 * r_16 + T.float32(0.5)
            p_22: T.let = p_21 * r_16 + T.float32(1.0)
            p_23: T.let = p_22 * r_16 + T.float32(1.0)
            exp_24: T.let = p_23 * power_17
            y[first + out] = v_12 / (T.float32(1.0) + exp_24)
