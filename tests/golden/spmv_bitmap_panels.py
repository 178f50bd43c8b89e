@T.prim_func(s_tir=True)
def spmv(x_h: T.handle("float32"), y_h: T.handle("float32"), work_h: T.handle("float32"), bias_h: T.handle("float32"), ptr0_h: T.handle("int32"), bits0_h: T.handle("uint16"), val0_h: T.handle("float32"), M: T.int64, N: T.int64, K: T.int64, reach: T.int64, pitch: T.int64, x_stride: T.int64, y_stride: T.int64, res_stride: T.int64, tasks: T.int64, C0: T.int64, P0: T.int64):
    T.func_attr({"tirx.noalias": True, "global_symbol": "spmv"})
    x = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=x_h, align=4)
    y = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=y_h, align=4)
    work = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=work_h, align=4)
    bias = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=bias_h, align=4)
    ptr0 = T.decl_buffer((T.int64(1) << T.int64(40),), "int32", data=ptr0_h, align=4)
    bits0 = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=bits0_h, align=2)
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
            units_at[0] = (N + 3) // 4
            units: T.let = units_at[0]
            first_at = T.alloc_buffer((1,), "int64", scope="global")
            first_at[0] = T.min(N, task * units // tasks * 4)
            first: T.let = first_at[0]
            last_at = T.alloc_buffer((1,), "int64", scope="global")
            last_at[0] = T.min(N, (task + 1) * units // tasks * 4)
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
                for p0 in range(P0):
                    for i in range((last - first + 3) // 4):
                        parent0: T.let = p0 * ((N + 3) // 4) + first // 4 + i
                        row_1: T.let = first + i * 4
                        sum2_0 = T.alloc_buffer((4,), "float32", scope="global")
                        sum2_0[T.ramp(0, 1, 4)] = T.broadcast(T.float32(0), 4)
                        words0: T.let = (C0 + 15) // 16
                        at0 = T.alloc_buffer((1,), "int64", scope="global")
                        mask0 = T.alloc_buffer((1,), "int32", scope="global")
                        at0[0] = T.Cast("int64", ptr0[parent0])
                        for word in range(words0):
                            mask0[0] = T.Cast("int32", bits0[parent0 * words0 + word])
                            while mask0[0] != 0:
                                entry_3: T.let = at0[0]
                                xb_4: T.let = word * 16 + T.Cast("int64", T.call_llvm_pure_intrin("int32", "llvm.cttz", mask0[0], T.bool(True)))
                                weight_5: T.let = val0[T.ramp(entry_3 * 4 + 0 * 4 + 0, 1, 4)]
                                x_6: T.let = T.broadcast(work[xs_at + p0 * C0 * 1 + xb_4 + 0 * 1], 4)
                                sum2_0[T.ramp(0, 1, 4)] = sum2_0[T.ramp(0, 1, 4)] + weight_5 * x_6
                                at0[0] = at0[0] + T.int64(1)
                                mask0[0] = T.bitwise_and(mask0[0], mask0[0] - 1)
                        work[T.ramp(ot + row_1 + 0, 1, 4)] = work[T.ramp(ot + row_1 + 0, 1, 4)] + sum2_0[T.ramp(0, 1, 4)]
                for m in range(T.min(T.int64(1), tokens - tile * 1)):
                    row_at = T.alloc_buffer((1,), "int64", scope="global")
                    row_at[0] = head + tile * 1 + m
                    row: T.let = row_at[0]
                    for v in range((last - first) // 4):
                        at: T.let = first + v * 4
                        y[T.ramp(row * y_stride + at, 1, 4)] = work[T.ramp(ot + m * pitch + at, 1, 4)]
                    for v in range((last - first) % 4):
                        at: T.let = first + (last - first) // 4 * 4 + v
                        y[row * y_stride + at] = work[ot + m * pitch + at]
