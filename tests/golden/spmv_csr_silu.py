@T.prim_func(s_tir=True)
def spmv(x_h: T.handle("float32"), y_h: T.handle("float32"), work_h: T.handle("float32"), bias_h: T.handle("float32"), ptr0_h: T.handle("int32"), idx0_h: T.handle("uint16"), val0_h: T.handle("float32"), M: T.int64, N: T.int64, K: T.int64, reach: T.int64, pitch: T.int64, x_stride: T.int64, y_stride: T.int64, res_stride: T.int64, tasks: T.int64, C0: T.int64, P0: T.int64):
    T.func_attr({"tirx.noalias": True, "global_symbol": "spmv"})
    x = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=x_h, align=4)
    y = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=y_h, align=4)
    work = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=work_h, align=4)
    bias = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=bias_h, align=4)
    ptr0 = T.decl_buffer((T.int64(1) << T.int64(40),), "int32", data=ptr0_h, align=4)
    idx0 = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=idx0_h, align=2)
    val0 = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=val0_h, align=4)
    T.attr(T.int32(0), "device_id", 0)
    T.attr(T.int32(0), "device_type", 1)
    for group in range((M + 0) // 1):
        head_at = T.alloc_buffer((1,), "int64", scope="global")
        head_at[0] = group * 1
        head: T.let = head_at[0]
        tokens_at = T.alloc_buffer((1,), "int64", scope="global")
        tokens_at[0] = T.min(M - head, T.int64(1))
        tokens: T.let = tokens_at[0]
        xs_at = T.alloc_buffer((1,), "int64", scope="global")
        xs_at[0] = 1 * (pitch + 0 * reach)
        xs: T.let = xs_at[0]
        for m in range(1):
            xs_from_at = T.alloc_buffer((1,), "int64", scope="global")
            xs_from_at[0] = (head + T.min(m, tokens - 1)) * x_stride
            xs_from: T.let = xs_from_at[0]
            xs_to_at = T.alloc_buffer((1,), "int64", scope="global")
            xs_to_at[0] = xs + m * reach
            xs_to: T.let = xs_to_at[0]
            for k in range(K // 4):
                work[T.ramp(xs_to + k * 4 + 0, 1, 4)] = x[T.ramp(xs_from + k * 4 + 0, 1, 4)]
            for rest in range(reach - K // 4 * 4):
                k: T.let = K // 4 * 4 + rest
                work[xs_to + k] = T.if_then_else(k < K, x[xs_from + k], T.float32(0))
        for task in T.parallel(tasks):
            units_at = T.alloc_buffer((1,), "int64", scope="global")
            units_at[0] = (N + 0) // 1
            units: T.let = units_at[0]
            parents_at = T.alloc_buffer((1,), "int64", scope="global")
            parents_at[0] = (N + 0) // 1
            parents: T.let = parents_at[0]
            total_at = T.alloc_buffer((1,), "int64", scope="global")
            total_at[0] = T.Cast("int64", ptr0[parents]) * 6 + parents * (64)
            total: T.let = total_at[0]
            first_low = T.alloc_buffer((1,), "int64", scope="global")
            first_low[0] = T.int64(0)
            first_high = T.alloc_buffer((1,), "int64", scope="global")
            first_high[0] = units
            while first_low[0] < first_high[0]:
                middle: T.let = (first_low[0] + first_high[0]) // 2
                parent: T.let = T.min(parents, middle * 1)
                if (T.Cast("int64", ptr0[parent]) * 6 + parent * (64)) * tasks < task * total:
                    first_low[0] = middle + 1
                else:
                    first_high[0] = middle
            first_at = T.alloc_buffer((1,), "int64", scope="global")
            first_at[0] = T.min(N, first_low[0] * 1)
            first: T.let = first_at[0]
            last_low = T.alloc_buffer((1,), "int64", scope="global")
            last_low[0] = T.int64(0)
            last_high = T.alloc_buffer((1,), "int64", scope="global")
            last_high[0] = units
            while last_low[0] < last_high[0]:
                middle: T.let = (last_low[0] + last_high[0]) // 2
                parent: T.let = T.min(parents, middle * 1)
                if (T.Cast("int64", ptr0[parent]) * 6 + parent * (64)) * tasks < (task + 1) * total:
                    last_low[0] = middle + 1
                else:
                    last_high[0] = middle
            last_at = T.alloc_buffer((1,), "int64", scope="global")
            last_at[0] = T.min(N, last_low[0] * 1)
            last: T.let = last_at[0]
            for tile in range((tokens + 0) // 1):
                xs_at_at = T.alloc_buffer((1,), "int64", scope="global")
                xs_at_at[0] = xs + tile * 1 * reach
                xs_at: T.let = xs_at_at[0]
                ot_at = T.alloc_buffer((1,), "int64", scope="global")
                ot_at[0] = tile * 1 * pitch
                ot: T.let = ot_at[0]
                for m in range(1):
                    for v in range((last - first) // 4):
                        at: T.let = first + v * 4
                        work[T.ramp(ot + m * pitch + at, 1, 4)] = bias[T.ramp(at, 1, 4)]
                    for v in range((last - first) % 4):
                        at: T.let = first + (last - first) // 4 * 4 + v
                        work[ot + m * pitch + at] = bias[at]
                begin0_at = T.alloc_buffer((1,), "int64", scope="global")
                begin0_at[0] = first // 1
                begin0: T.let = begin0_at[0]
                count0_at = T.alloc_buffer((1,), "int64", scope="global")
                count0_at[0] = (last - first + 0) // 1
                count0: T.let = count0_at[0]
                each0_at = T.alloc_buffer((1,), "int64", scope="global")
                each0_at[0] = count0 // 1
                each0: T.let = each0_at[0]
                for i in range(each0):
                    place_1: T.let = i
                    sum2_0 = T.alloc_buffer((1,), "float32", scope="global")
                    sum2_0[0] = T.float32(0)
                    parent_3: T.let = begin0 + place_1
                    lo_4: T.let = T.Cast("int64", ptr0[parent_3])
                    entries_5: T.let = T.Cast("int64", ptr0[parent_3 + 1]) - lo_4
                    common_6_at = T.alloc_buffer((1,), "int64", scope="global")
                    common_6_at[0] = entries_5
                    common_6: T.let = common_6_at[0]
                    for j in range(common_6):
                        entry_7: T.let = lo_4 + j
                        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(val0[entry_7 * 1 + 256]), T.int32(0), T.int32(3), T.int32(1)))
                        xb_8: T.let = T.Cast("int64", idx0[entry_7])
                        weight_9: T.let = val0[entry_7 * 1 + 0 * 1 + 0]
                        x_10: T.let = work[xs_at + xb_8 + 0 * 1]
                        sum2_0[0] = sum2_0[0] + weight_9 * x_10
                    work[ot + first + place_1 * 1] = work[ot + first + place_1 * 1] + sum2_0[0]
                for m in range(T.min(T.int64(1), tokens - tile * 1)):
                    row_at = T.alloc_buffer((1,), "int64", scope="global")
                    row_at[0] = head + tile * 1 + m
                    row: T.let = row_at[0]
                    for v in range((last - first) // 4):
                        at: T.let = first + v * 4
                        v_11: T.let = work[T.ramp(ot + m * pitch + at, 1, 4)]
                        e_12: T.let = T.max(T.min(T.broadcast(T.float32(0.0), 4) - v_11, T.broadcast(T.float32(89.0), 4)), T.broadcast(T.float32(-87.0), 4))
                        sum_13: T.let = T.call_llvm_pure_intrin("float32x4", "llvm.fmuladd", e_12, T.broadcast(T.float32(1.4426950408889634), 4), T.broadcast(T.float32(12583039.0), 4))
                        n_14: T.let = sum_13 - T.broadcast(T.float32(12583039.0), 4)
                        r_15: T.let = e_12 - n_14 * T.broadcast(T.float32(0.693359375), 4) + n_14 * T.broadcast(T.float32(0.00021219444), 4)
                        p_16: T.let = T.broadcast(T.float32(0.008290315515403657), 4) * r_15 + T.broadcast(T.float32(0.04189793485426787), 4)
                        p_17: T.let = p_16 * r_15 + T.broadcast(T.float32(0.16667635708151302), 4)
                        p_18: T.let = p_17 * r_15 + T.broadcast(T.float32(0.4999915024148878), 4)
                        p_19: T.let = p_18 * r_15 + T.broadcast(T.float32(0.999999744773859), 4)
                        p_20: T.let = p_19 * r_15 + T.broadcast(T.float32(1.0), 4)
                        power_21: T.let = T.reinterpret("float32x4", T.shift_left(T.reinterpret("int32x4", sum_13), T.broadcast(T.int32(23), 4)))
                        exp_22: T.let = p_20 * power_21
                        y[T.ramp(row * y_stride + at, 1, 4)] = v_11 / (T.broadcast(T.float32(1.0), 4) + exp_22)
                    for v in range((last - first) % 4):
                        at: T.let = first + (last - first) // 4 * 4 + v
                        v_23: T.let = work[ot + m * pitch + at]
                        e_24: T.let = T.max(T.min(T.float32(0.0) - v_23, T.float32(89.0)), T.float32(-87.0))
                        sum_25: T.let = T.call_llvm_pure_intrin("float32", "llvm.fmuladd", e_24, T.float32(1.4426950408889634), T.float32(12583039.0))
                        n_26: T.let = sum_25 - T.float32(12583039.0)
                        r_27: T.let = e_24 - n_26 * T.float32(0.693359375) + n_26 * T.float32(0.00021219444)
                        p_28: T.let = T.float32(0.008290315515403657) * r_27 + T.float32(0.04189793485426787)
                        p_29: T.let = p_28 * r_27 + T.float32(0.16667635708151302)
                        p_30: T.let = p_29 * r_27 + T.float32(0.4999915024148878)
                        p_31: T.let = p_30 * r_27 + T.float32(0.999999744773859)
                        p_32: T.let = p_31 * r_27 + T.float32(1.0)
                        power_33: T.let = T.reinterpret("float32", T.shift_left(T.reinterpret("int32", sum_25), T.int32(23)))
                        exp_34: T.let = p_32 * power_33
                        y[row * y_stride + at] = v_23 / (T.float32(1.0) + exp_34)
