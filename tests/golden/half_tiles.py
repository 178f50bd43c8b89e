@T.prim_func(s_tir=True)
def spmm(x_h: T.handle("uint16"), y_h: T.handle("float32"), bias_h: T.handle("float32"), res_h: T.handle("float32"), ptr0_h: T.handle("int32"), idx0_h: T.handle("uint16"), val0_h: T.handle("uint16"), S: T.int64, N: T.int64, tiles: T.int64, per: T.int64, x_stride: T.int64, x_span: T.int64, x_batch: T.int64, y_stride: T.int64, y_span: T.int64, y_batch: T.int64, res_stride: T.int64, res_span: T.int64, res_batch: T.int64, C0: T.int64, P0: T.int64):
    T.func_attr({"tirx.noalias": True, "global_symbol": "spmm"})
    x = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=x_h, align=2)
    y = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=y_h, align=4)
    bias = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=bias_h, align=4)
    res = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=res_h, align=4)
    ptr0 = T.decl_buffer((T.int64(1) << T.int64(40),), "int32", data=ptr0_h, align=4)
    idx0 = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=idx0_h, align=2)
    val0 = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=val0_h, align=2)
    T.attr(T.int32(0), "device_id", 0)
    T.attr(T.int32(0), "device_type", 1)
    chunks: T.let = (N + 63) // 64
    for task in T.parallel(tiles * chunks):
        tile_at = T.alloc_buffer((1,), "int64", scope="global")
        tile_at[0] = task % tiles
        tile: T.let = tile_at[0]
        first_at = T.alloc_buffer((1,), "int64", scope="global")
        first_at[0] = task // tiles * 64
        first: T.let = first_at[0]
        last_at = T.alloc_buffer((1,), "int64", scope="global")
        last_at[0] = T.min(N, first + 64)
        last: T.let = last_at[0]
        batch_at = T.alloc_buffer((1,), "int64", scope="global")
        batch_at[0] = tile // per
        batch: T.let = batch_at[0]
        start_at = T.alloc_buffer((1,), "int64", scope="global")
        start_at[0] = tile % per * 64
        start: T.let = start_at[0]
        left_at = T.alloc_buffer((1,), "int64", scope="global")
        left_at[0] = T.min((S - start + 15) // 16, T.int64(4))
        left: T.let = left_at[0]
        xt_at = T.alloc_buffer((1,), "int64", scope="global")
        xt_at[0] = batch * x_batch + start // 64 * x_span + start % 64
        xt: T.let = xt_at[0]
        yt_at = T.alloc_buffer((1,), "int64", scope="global")
        yt_at[0] = batch * y_batch + start // 64 * y_span + start % 64
        yt: T.let = yt_at[0]
        rt_at = T.alloc_buffer((1,), "int64", scope="global")
        rt_at[0] = batch * res_batch + start // 64 * res_span + start % 64
        rt: T.let = rt_at[0]
        sums = T.alloc_buffer((1024,), "float32", scope="global")
        pairs = T.alloc_buffer((4096,), "uint16", scope="global")
        shapes = T.alloc_buffer((64,), "uint8", scope="global")
        shapes[T.ramp(0, 1, 64)] = T.broadcast(T.uint8(0), 64)
        shapes[0] = T.uint8(1)
        for t in range(8):
            shapes[16 + t * 2] = T.uint8(64)
            shapes[48 + t] = T.uint8(16)
        T.evaluate(T.call_llvm_intrin("void", "llvm.x86.ldtilecfg", T.address_of(shapes[0])))
        if left == 4:
            step_at = T.alloc_buffer((1,), "int64", scope="global")
            step_at[0] = T.Cast("int64", ptr0[first // 16])
            step: T.let = step_at[0]
            end_at = T.alloc_buffer((1,), "int64", scope="global")
            end_at[0] = T.Cast("int64", ptr0[(last + 15) // 16])
            end: T.let = end_at[0]
            if step < end:
                step_1: T.let = step
                for p in range(16):
                    col_2: T.let = T.Cast("int64", idx0[step_1 * 32 + p * 2 + 0])
                    col_3: T.let = T.Cast("int64", idx0[step_1 * 32 + p * 2 + 1])
                    x_4: T.let = x[T.ramp(xt + col_2 * 64 + T.int64(0) + 0, 1, 32)]
                    x_5: T.let = x[T.ramp(xt + col_3 * 64 + T.int64(0) + 0, 1, 32)]
                    pairs_6: T.let = T.Shuffle([x_4, x_5], [0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59])
                    pairs_7: T.let = T.Shuffle([x_4, x_5], [4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52, 21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63])
                    x_8: T.let = x[T.ramp(xt + col_2 * 64 + T.int64(0) + 32, 1, 32)]
                    x_9: T.let = x[T.ramp(xt + col_3 * 64 + T.int64(0) + 32, 1, 32)]
                    pairs_10: T.let = T.Shuffle([x_8, x_9], [0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59])
                    pairs_11: T.let = T.Shuffle([x_8, x_9], [4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52, 21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63])
                    pairs[T.ramp(step_1 % 2 * 2048 + 0 + p * 32, 1, 32)] = pairs_6
                    pairs[T.ramp(step_1 % 2 * 2048 + 512 + p * 32, 1, 32)] = pairs_7
                    pairs[T.ramp(step_1 % 2 * 2048 + 1024 + p * 32, 1, 32)] = pairs_10
                    pairs[T.ramp(step_1 % 2 * 2048 + 1536 + p * 32, 1, 32)] = pairs_11
            for i in range((last - first + 15) // 16):
                row: T.let = first + i * 16
                begin: T.let = T.Cast("int64", ptr0[row // 16])
                until: T.let = T.Cast("int64", ptr0[row // 16 + 1])
                T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilezero", T.int8(0)))
                T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilezero", T.int8(1)))
                T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilezero", T.int8(2)))
                T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilezero", T.int8(3)))
                for j in range(until - begin):
                    now: T.let = begin + j
                    step_12: T.let = T.min(now + 1, end - 1)
                    for p in range(16):
                        col_13: T.let = T.Cast("int64", idx0[step_12 * 32 + p * 2 + 0])
                        col_14: T.let = T.Cast("int64", idx0[step_12 * 32 + p * 2 + 1])
                        x_15: T.let = x[T.ramp(xt + col_13 * 64 + T.int64(0) + 0, 1, 32)]
                        x_16: T.let = x[T.ramp(xt + col_14 * 64 + T.int64(0) + 0, 1, 32)]
                        pairs_17: T.let = T.Shuffle([x_15, x_16], [0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59])
                        pairs_18: T.let = T.Shuffle([x_15, x_16], [4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52, 21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63])
                        x_19: T.let = x[T.ramp(xt + col_13 * 64 + T.int64(0) + 32, 1, 32)]
                        x_20: T.let = x[T.ramp(xt + col_14 * 64 + T.int64(0) + 32, 1, 32)]
                        pairs_21: T.let = T.Shuffle([x_19, x_20], [0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59])
                        pairs_22: T.let = T.Shuffle([x_19, x_20], [4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52, 21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63])
                        pairs[T.ramp(step_12 % 2 * 2048 + 0 + p * 32, 1, 32)] = pairs_17
                        pairs[T.ramp(step_12 % 2 * 2048 + 512 + p * 32, 1, 32)] = pairs_18
                        pairs[T.ramp(step_12 % 2 * 2048 + 1024 + p * 32, 1, 32)] = pairs_21
                        pairs[T.ramp(step_12 % 2 * 2048 + 1536 + p * 32, 1, 32)] = pairs_22
                    weights_23: T.let = now * 512
                    for line in range(16):
                        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(val0[weights_23 + 2048 + line * 32]), T.int32(0), T.int32(3), T.int32(1)))
                    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tileloadd64", T.int8(4), T.address_of(val0[weights_23]), T.int64(64)))
                    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tileloadd64", T.int8(5), T.address_of(pairs[now % 2 * 2048 + 0]), T.int64(64)))
                    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tdpbf16ps", T.int8(0), T.int8(4), T.int8(5)))
                    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tileloadd64", T.int8(6), T.address_of(pairs[now % 2 * 2048 + 512]), T.int64(64)))
                    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tdpbf16ps", T.int8(1), T.int8(4), T.int8(6)))
                    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tileloadd64", T.int8(7), T.address_of(pairs[now % 2 * 2048 + 1024]), T.int64(64)))
                    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tdpbf16ps", T.int8(2), T.int8(4), T.int8(7)))
                    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tileloadd64", T.int8(5), T.address_of(pairs[now % 2 * 2048 + 1536]), T.int64(64)))
                    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tdpbf16ps", T.int8(3), T.int8(4), T.int8(5)))
                T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilestored64", T.int8(0), T.address_of(sums[0 + 0]), T.int64(256)))
                T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilestored64", T.int8(1), T.address_of(sums[0 + 16]), T.int64(256)))
                T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilestored64", T.int8(2), T.address_of(sums[0 + 32]), T.int64(256)))
                T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilestored64", T.int8(3), T.address_of(sums[0 + 48]), T.int64(256)))
                for r in range(T.min(T.int64(16), last - row)):
                    total_24: T.let = sums[T.ramp(0 + r * 64 + 0, 1, 16)] + T.broadcast(bias[row + r], 16)
                    total_25: T.let = sums[T.ramp(0 + r * 64 + 16, 1, 16)] + T.broadcast(bias[row + r], 16)
                    total_26: T.let = sums[T.ramp(0 + r * 64 + 32, 1, 16)] + T.broadcast(bias[row + r], 16)
                    total_27: T.let = sums[T.ramp(0 + r * 64 + 48, 1, 16)] + T.broadcast(bias[row + r], 16)
                    y[T.ramp(yt + (row + r) * y_stride + T.int64(0) + 0, 1, 16)] = total_24 + res[T.ramp(rt + (row + r) * res_stride + T.int64(0) + 0, 1, 16)]
                    y[T.ramp(yt + (row + r) * y_stride + T.int64(0) + 16, 1, 16)] = total_25 + res[T.ramp(rt + (row + r) * res_stride + T.int64(0) + 16, 1, 16)]
                    y[T.ramp(yt + (row + r) * y_stride + T.int64(0) + 32, 1, 16)] = total_26 + res[T.ramp(rt + (row + r) * res_stride + T.int64(0) + 32, 1, 16)]
                    y[T.ramp(yt + (row + r) * y_stride + T.int64(0) + 48, 1, 16)] = total_27 + res[T.ramp(rt + (row + r) * res_stride + T.int64(0) + 48, 1, 16)]
        if (left < 4) and (T.bitwise_and(left, T.int64(2)) != 0):
            offset_28: T.let = left // 4 * 64
            step_at = T.alloc_buffer((1,), "int64", scope="global")
            step_at[0] = T.Cast("int64", ptr0[first // 16])
            step: T.let = step_at[0]
            end_at = T.alloc_buffer((1,), "int64", scope="global")
            end_at[0] = T.Cast("int64", ptr0[(last + 15) // 16])
            end: T.let = end_at[0]
            if step < end:
                step_29: T.let = step
                for p in range(16):
                    col_30: T.let = T.Cast("int64", idx0[step_29 * 32 + p * 2 + 0])
                    col_31: T.let = T.Cast("int64", idx0[step_29 * 32 + p * 2 + 1])
                    x_32: T.let = x[T.ramp(xt + col_30 * 64 + offset_28 + 0, 1, 32)]
                    x_33: T.let = x[T.ramp(xt + col_31 * 64 + offset_28 + 0, 1, 32)]
                    pairs_34: T.let = T.Shuffle([x_32, x_33], [0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59])
                    pairs_35: T.let = T.Shuffle([x_32, x_33], [4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52, 21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63])
                    pairs[T.ramp(step_29 % 2 * 2048 + 0 + p * 32, 1, 32)] = pairs_34
                    pairs[T.ramp(step_29 % 2 * 2048 + 512 + p * 32, 1, 32)] = pairs_35
            for i in range((last - first + 15) // 16):
                row: T.let = first + i * 16
                begin: T.let = T.Cast("int64", ptr0[row // 16])
                until: T.let = T.Cast("int64", ptr0[row // 16 + 1])
                T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilezero", T.int8(0)))
                T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilezero", T.int8(1)))
                for j in range(until - begin):
                    now: T.let = begin + j
                    step_36: T.let = T.min(now + 1, end - 1)
                    for p in range(16):
                        col_37: T.let = T.Cast("int64", idx0[step_36 * 32 + p * 2 + 0])
                        col_38: T.let = T.Cast("int64", idx0[step_36 * 32 + p * 2 + 1])
                        x_39: T.let = x[T.ramp(xt + col_37 * 64 + offset_28 + 0, 1, 32)]
                        x_40: T.let = x[T.ramp(xt + col_38 * 64 + offset_28 + 0, 1, 32)]
                        pairs_41: T.let = T.Shuffle([x_39, x_40], [0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59])
                        pairs_42: T.let = T.Shuffle([x_39, x_40], [4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52, 21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63])
                        pairs[T.ramp(step_36 % 2 * 2048 + 0 + p * 32, 1, 32)] = pairs_41
                        pairs[T.ramp(step_36 % 2 * 2048 + 512 + p * 32, 1, 32)] = pairs_42
                    weights_43: T.let = now * 512
                    for line in range(16):
                        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(val0[weights_43 + 2048 + line * 32]), T.int32(0), T.int32(3), T.int32(1)))
                    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tileloadd64", T.int8(4), T.address_of(val0[weights_43]), T.int64(64)))
                    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tileloadd64", T.int8(5), T.address_of(pairs[now % 2 * 2048 + 0]), T.int64(64)))
                    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tdpbf16ps", T.int8(0), T.int8(4), T.int8(5)))
                    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tileloadd64", T.int8(6), T.address_of(pairs[now % 2 * 2048 + 512]), T.int64(64)))
                    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tdpbf16ps", T.int8(1), T.int8(4), T.int8(6)))
                T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilestored64", T.int8(0), T.address_of(sums[0 + 0]), T.int64(256)))
                T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilestored64", T.int8(1), T.address_of(sums[0 + 16]), T.int64(256)))
                for r in range(T.min(T.int64(16), last - row)):
                    total_44: T.let = sums[T.ramp(0 + r * 64 + 0, 1, 16)] + T.broadcast(bias[row + r], 16)
                    total_45: T.let = sums[T.ramp(0 + r * 64 + 16, 1, 16)] + T.broadcast(bias[row + r], 16)
                    y[T.ramp(yt + (row + r) * y_stride + offset_28 + 0, 1, 16)] = total_44 + res[T.ramp(rt + (row + r) * res_stride + offset_28 + 0, 1, 16)]
                    y[T.ramp(yt + (row + r) * y_stride + offset_28 + 16, 1, 16)] = total_45 + res[T.ramp(rt + (row + r) * res_stride + offset_28 + 16, 1, 16)]
        if (left < 4) and (T.bitwise_and(left, T.int64(1)) != 0):
            offset_46: T.let = left // 2 * 32
            step_at = T.alloc_buffer((1,), "int64", scope="global")
            step_at[0] = T.Cast("int64", ptr0[first // 16])
            step: T.let = step_at[0]
            end_at = T.alloc_buffer((1,), "int64", scope="global")
            end_at[0] = T.Cast("int64", ptr0[(last + 15) // 16])
            end: T.let = end_at[0]
            if step < end:
                step_47: T.let = step
                for p in range(16):
                    col_48: T.let = T.Cast("int64", idx0[step_47 * 32 + p * 2 + 0])
                    col_49: T.let = T.Cast("int64", idx0[step_47 * 32 + p * 2 + 1])
                    x_50: T.let = x[T.ramp(xt + col_48 * 64 + offset_46 + 0, 1, 32)]
                    x_51: T.let = x[T.ramp(xt + col_49 * 64 + offset_46 + 0, 1, 32)]
                    pairs_52: T.let = T.Shuffle([x_50, x_51], [0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59])
                    pairs[T.ramp(step_47 % 2 * 2048 + 0 + p * 32, 1, 32)] = pairs_52
            for i in range((last - first + 15) // 16):
                row: T.let = first + i * 16
                begin: T.let = T.Cast("int64", ptr0[row // 16])
                until: T.let = T.Cast("int64", ptr0[row // 16 + 1])
                T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilezero", T.int8(0)))
                for j in range(until - begin):
                    now: T.let = begin + j
                    step_53: T.let = T.min(now + 1, end - 1)
                    for p in range(16):
                        col_54: T.let = T.Cast("int64", idx0[step_53 * 32 + p * 2 + 0])
                        col_55: T.let = T.Cast("int64", idx0[step_53 * 32 + p * 2 + 1])
                        x_56: T.let = x[T.ramp(xt + col_54 * 64 + offset_46 + 0, 1, 32)]
                        x_57: T.let = x[T.ramp(xt + col_55 * 64 + offset_46 + 0, 1, 32)]
                        pairs_58: T.let = T.Shuffle([x_56, x_57], [0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59])
                        pairs[T.ramp(step_53 % 2 * 2048 + 0 + p * 32, 1, 32)] = pairs_58
                    weights_59: T.let = now * 512
                    for line in range(16):
                        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(val0[weights_59 + 2048 + line * 32]), T.int32(0), T.int32(3), T.int32(1)))
                    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tileloadd64", T.int8(4), T.address_of(val0[weights_59]), T.int64(64)))
                    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tileloadd64", T.int8(5), T.address_of(pairs[now % 2 * 2048 + 0]), T.int64(64)))
                    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tdpbf16ps", T.int8(0), T.int8(4), T.int8(5)))
                T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilestored64", T.int8(0), T.address_of(sums[0 + 0]), T.int64(256)))
                for r in range(T.min(T.int64(16), last - row)):
                    total_60: T.let = sums[T.ramp(0 + r * 64 + 0, 1, 16)] + T.broadcast(bias[row + r], 16)
                    y[T.ramp(yt + (row + r) * y_stride + offset_46 + 0, 1, 16)] = total_60 + res[T.ramp(rt + (row + r) * res_stride + offset_46 + 0, 1, 16)]
        T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilerelease"))
