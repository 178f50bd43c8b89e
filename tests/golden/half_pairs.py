@T.prim_func(s_tir=True)
def spmm(x_h: T.handle("uint16"), y_h: T.handle("float32"), bias_h: T.handle("float32"), ptr0_h: T.handle("int32"), idx0_h: T.handle("uint16"), val0_h: T.handle("uint16"), S: T.int64, N: T.int64, tiles: T.int64, per: T.int64, x_stride: T.int64, x_span: T.int64, x_batch: T.int64, y_stride: T.int64, y_span: T.int64, y_batch: T.int64, res_stride: T.int64, res_span: T.int64, res_batch: T.int64, C0: T.int64, P0: T.int64):
    T.func_attr({"tirx.noalias": True, "global_symbol": "spmm"})
    x = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=x_h, align=2)
    y = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=y_h, align=4)
    bias = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=bias_h, align=4)
    ptr0 = T.decl_buffer((T.int64(1) << T.int64(40),), "int32", data=ptr0_h, align=4)
    idx0 = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=idx0_h, align=2)
    val0 = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=val0_h, align=2)
    T.attr(T.int32(0), "device_id", 0)
    T.attr(T.int32(0), "device_type", 1)
    chunks: T.let = (N + 63) // 64
    T.attr(T.int32(0), "pragma_import_llvm", 'declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)\ndefine internal <16 x float> @dot_pairs(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b) alwaysinline {\n  %x = bitcast <16 x i32> %a to <32 x bfloat>\n  %y = bitcast <16 x i32> %b to <32 x bfloat>\n  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)\n  ret <16 x float> %r\n}\n')
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
        if left == 4:
            for i in range((last - first + 1) // 2):
                row: T.let = first + i * 2
                begin: T.let = T.Cast("int64", ptr0[row // 2])
                until: T.let = T.Cast("int64", ptr0[row // 2 + 1])
                acc0 = T.alloc_buffer((64,), "float32", scope="global")
                acc1 = T.alloc_buffer((64,), "float32", scope="global")
                acc0[T.ramp(0, 1, 16)] = T.broadcast(T.float32(0), 16)
                acc0[T.ramp(16, 1, 16)] = T.broadcast(T.float32(0), 16)
                acc0[T.ramp(32, 1, 16)] = T.broadcast(T.float32(0), 16)
                acc0[T.ramp(48, 1, 16)] = T.broadcast(T.float32(0), 16)
                acc1[T.ramp(0, 1, 16)] = T.broadcast(T.float32(0), 16)
                acc1[T.ramp(16, 1, 16)] = T.broadcast(T.float32(0), 16)
                acc1[T.ramp(32, 1, 16)] = T.broadcast(T.float32(0), 16)
                acc1[T.ramp(48, 1, 16)] = T.broadcast(T.float32(0), 16)
                for j in range(until - begin):
                    now: T.let = begin + j
                    col_1: T.let = T.Cast("int64", idx0[now * 2 + 0])
                    col_2: T.let = T.Cast("int64", idx0[now * 2 + 1])
                    x_3: T.let = x[T.ramp(xt + col_1 * 64 + T.int64(0) + 0, 1, 32)]
                    x_4: T.let = x[T.ramp(xt + col_2 * 64 + T.int64(0) + 0, 1, 32)]
                    pairs_5: T.let = T.Shuffle([x_3, x_4], [0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59])
                    pairs_6: T.let = T.Shuffle([x_3, x_4], [4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52, 21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63])
                    x_7: T.let = x[T.ramp(xt + col_1 * 64 + T.int64(0) + 32, 1, 32)]
                    x_8: T.let = x[T.ramp(xt + col_2 * 64 + T.int64(0) + 32, 1, 32)]
                    pairs_9: T.let = T.Shuffle([x_7, x_8], [0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59])
                    pairs_10: T.let = T.Shuffle([x_7, x_8], [4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52, 21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63])
                    weight_11: T.let = T.reinterpret("int32", val0[T.ramp((now * 2 + 0) * 2, 1, 2)])
                    acc0[T.ramp(0, 1, 16)] = T.call_extern("float32x16", "dot_pairs", acc0[T.ramp(0, 1, 16)], T.broadcast(weight_11, 16), T.reinterpret("int32x16", pairs_5))
                    acc0[T.ramp(16, 1, 16)] = T.call_extern("float32x16", "dot_pairs", acc0[T.ramp(16, 1, 16)], T.broadcast(weight_11, 16), T.reinterpret("int32x16", pairs_6))
                    acc0[T.ramp(32, 1, 16)] = T.call_extern("float32x16", "dot_pairs", acc0[T.ramp(32, 1, 16)], T.broadcast(weight_11, 16), T.reinterpret("int32x16", pairs_9))
                    acc0[T.ramp(48, 1, 16)] = T.call_extern("float32x16", "dot_pairs", acc0[T.ramp(48, 1, 16)], T.broadcast(weight_11, 16), T.reinterpret("int32x16", pairs_10))
                    weight_12: T.let = T.reinterpret("int32", val0[T.ramp((now * 2 + 1) * 2, 1, 2)])
                    acc1[T.ramp(0, 1, 16)] = T.call_extern("float32x16", "dot_pairs", acc1[T.ramp(0, 1, 16)], T.broadcast(weight_12, 16), T.reinterpret("int32x16", pairs_5))
                    acc1[T.ramp(16, 1, 16)] = T.call_extern("float32x16", "dot_pairs", acc1[T.ramp(16, 1, 16)], T.broadcast(weight_12, 16), T.reinterpret("int32x16", pairs_6))
                    acc1[T.ramp(32, 1, 16)] = T.call_extern("float32x16", "dot_pairs", acc1[T.ramp(32, 1, 16)], T.broadcast(weight_12, 16), T.reinterpret("int32x16", pairs_9))
                    acc1[T.ramp(48, 1, 16)] = T.call_extern("float32x16", "dot_pairs", acc1[T.ramp(48, 1, 16)], T.broadcast(weight_12, 16), T.reinterpret("int32x16", pairs_10))
                total_13: T.let = acc0[T.ramp(0, 1, 16)] + T.broadcast(bias[row + 0], 16)
                total_14: T.let = acc0[T.ramp(16, 1, 16)] + T.broadcast(bias[row + 0], 16)
                total_15: T.let = acc0[T.ramp(32, 1, 16)] + T.broadcast(bias[row + 0], 16)
                total_16: T.let = acc0[T.ramp(48, 1, 16)] + T.broadcast(bias[row + 0], 16)
                y[T.ramp(yt + (row + 0) * y_stride + T.int64(0) + 0, 1, 16)] = total_13
                y[T.ramp(yt + (row + 0) * y_stride + T.int64(0) + 16, 1, 16)] = total_14
                y[T.ramp(yt + (row + 0) * y_stride + T.int64(0) + 32, 1, 16)] = total_15
                y[T.ramp(yt + (row + 0) * y_stride + T.int64(0) + 48, 1, 16)] = total_16
                total_17: T.let = acc1[T.ramp(0, 1, 16)] + T.broadcast(bias[row + 1], 16)
                total_18: T.let = acc1[T.ramp(16, 1, 16)] + T.broadcast(bias[row + 1], 16)
                total_19: T.let = acc1[T.ramp(32, 1, 16)] + T.broadcast(bias[row + 1], 16)
                total_20: T.let = acc1[T.ramp(48, 1, 16)] + T.broadcast(bias[row + 1], 16)
                y[T.ramp(yt + (row + 1) * y_stride + T.int64(0) + 0, 1, 16)] = total_17
                y[T.ramp(yt + (row + 1) * y_stride + T.int64(0) + 16, 1, 16)] = total_18
                y[T.ramp(yt + (row + 1) * y_stride + T.int64(0) + 32, 1, 16)] = total_19
                y[T.ramp(yt + (row + 1) * y_stride + T.int64(0) + 48, 1, 16)] = total_20
        if (left < 4) and (T.bitwise_and(left, T.int64(2)) != 0):
            offset_21: T.let = left // 4 * 64
            for i in range((last - first + 1) // 2):
                row: T.let = first + i * 2
                begin: T.let = T.Cast("int64", ptr0[row // 2])
                until: T.let = T.Cast("int64", ptr0[row // 2 + 1])
                acc0 = T.alloc_buffer((32,), "float32", scope="global")
                acc1 = T.alloc_buffer((32,), "float32", scope="global")
                acc0[T.ramp(0, 1, 16)] = T.broadcast(T.float32(0), 16)
                acc0[T.ramp(16, 1, 16)] = T.broadcast(T.float32(0), 16)
                acc1[T.ramp(0, 1, 16)] = T.broadcast(T.float32(0), 16)
                acc1[T.ramp(16, 1, 16)] = T.broadcast(T.float32(0), 16)
                for j in range(until - begin):
                    now: T.let = begin + j
                    col_22: T.let = T.Cast("int64", idx0[now * 2 + 0])
                    col_23: T.let = T.Cast("int64", idx0[now * 2 + 1])
                    x_24: T.let = x[T.ramp(xt + col_22 * 64 + offset_21 + 0, 1, 32)]
                    x_25: T.let = x[T.ramp(xt + col_23 * 64 + offset_21 + 0, 1, 32)]
                    pairs_26: T.let = T.Shuffle([x_24, x_25], [0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59])
                    pairs_27: T.let = T.Shuffle([x_24, x_25], [4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52, 21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63])
                    weight_28: T.let = T.reinterpret("int32", val0[T.ramp((now * 2 + 0) * 2, 1, 2)])
                    acc0[T.ramp(0, 1, 16)] = T.call_extern("float32x16", "dot_pairs", acc0[T.ramp(0, 1, 16)], T.broadcast(weight_28, 16), T.reinterpret("int32x16", pairs_26))
                    acc0[T.ramp(16, 1, 16)] = T.call_extern("float32x16", "dot_pairs", acc0[T.ramp(16, 1, 16)], T.broadcast(weight_28, 16), T.reinterpret("int32x16", pairs_27))
                    weight_29: T.let = T.reinterpret("int32", val0[T.ramp((now * 2 + 1) * 2, 1, 2)])
                    acc1[T.ramp(0, 1, 16)] = T.call_extern("float32x16", "dot_pairs", acc1[T.ramp(0, 1, 16)], T.broadcast(weight_29, 16), T.reinterpret("int32x16", pairs_26))
                    acc1[T.ramp(16, 1, 16)] = T.call_extern("float32x16", "dot_pairs", acc1[T.ramp(16, 1, 16)], T.broadcast(weight_29, 16), T.reinterpret("int32x16", pairs_27))
                total_30: T.let = acc0[T.ramp(0, 1, 16)] + T.broadcast(bias[row + 0], 16)
                total_31: T.let = acc0[T.ramp(16, 1, 16)] + T.broadcast(bias[row + 0], 16)
                y[T.ramp(yt + (row + 0) * y_stride + offset_21 + 0, 1, 16)] = total_30
                y[T.ramp(yt + (row + 0) * y_stride + offset_21 + 16, 1, 16)] = total_31
                total_32: T.let = acc1[T.ramp(0, 1, 16)] + T.broadcast(bias[row + 1], 16)
                total_33: T.let = acc1[T.ramp(16, 1, 16)] + T.broadcast(bias[row + 1], 16)
                y[T.ramp(yt + (row + 1) * y_stride + offset_21 + 0, 1, 16)] = total_32
                y[T.ramp(yt + (row + 1) * y_stride + offset_21 + 16, 1, 16)] = total_33
        if (left < 4) and (T.bitwise_and(left, T.int64(1)) != 0):
            offset_34: T.let = left // 2 * 32
            for i in range((last - first + 1) // 2):
                row: T.let = first + i * 2
                begin: T.let = T.Cast("int64", ptr0[row // 2])
                until: T.let = T.Cast("int64", ptr0[row // 2 + 1])
                acc0 = T.alloc_buffer((16,), "float32", scope="global")
                acc1 = T.alloc_buffer((16,), "float32", scope="global")
                acc0[T.ramp(0, 1, 16)] = T.broadcast(T.float32(0), 16)
                acc1[T.ramp(0, 1, 16)] = T.broadcast(T.float32(0), 16)
                for j in range(until - begin):
                    now: T.let = begin + j
                    col_35: T.let = T.Cast("int64", idx0[now * 2 + 0])
                    col_36: T.let = T.Cast("int64", idx0[now * 2 + 1])
                    x_37: T.let = x[T.ramp(xt + col_35 * 64 + offset_34 + 0, 1, 32)]
                    x_38: T.let = x[T.ramp(xt + col_36 * 64 + offset_34 + 0, 1, 32)]
                    pairs_39: T.let = T.Shuffle([x_37, x_38], [0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59])
                    weight_40: T.let = T.reinterpret("int32", val0[T.ramp((now * 2 + 0) * 2, 1, 2)])
                    acc0[T.ramp(0, 1, 16)] = T.call_extern("float32x16", "dot_pairs", acc0[T.ramp(0, 1, 16)], T.broadcast(weight_40, 16), T.reinterpret("int32x16", pairs_39))
                    weight_41: T.let = T.reinterpret("int32", val0[T.ramp((now * 2 + 1) * 2, 1, 2)])
                    acc1[T.ramp(0, 1, 16)] = T.call_extern("float32x16", "dot_pairs", acc1[T.ramp(0, 1, 16)], T.broadcast(weight_41, 16), T.reinterpret("int32x16", pairs_39))
                total_42: T.let = acc0[T.ramp(0, 1, 16)] + T.broadcast(bias[row + 0], 16)
                y[T.ramp(yt + (row + 0) * y_stride + offset_34 + 0, 1, 16)] = total_42
                total_43: T.let = acc1[T.ramp(0, 1, 16)] + T.broadcast(bias[row + 1], 16)
                y[T.ramp(yt + (row + 1) * y_stride + offset_34 + 0, 1, 16)] = total_43
