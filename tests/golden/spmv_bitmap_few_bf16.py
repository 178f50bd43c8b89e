@T.prim_func(s_tir=True)
def spmv(x_h: T.handle("uint16"), y_h: T.handle("uint16"), res_h: T.handle("uint16"), work_h: T.handle("float32"), bias_h: T.handle("uint16"), ptr0_h: T.handle("int32"), bits0_h: T.handle("uint16"), val0_h: T.handle("uint16"), M: T.int64, N: T.int64, K: T.int64, reach: T.int64, pitch: T.int64, x_stride: T.int64, y_stride: T.int64, res_stride: T.int64, tasks: T.int64, C0: T.int64, P0: T.int64):
    T.func_attr({"tirx.noalias": True, "global_symbol": "spmv"})
    x = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=x_h, align=2)
    y = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=y_h, align=2)
    res = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=res_h, align=2)
    work = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=work_h, align=4)
    bias = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=bias_h, align=2)
    ptr0 = T.decl_buffer((T.int64(1) << T.int64(40),), "int32", data=ptr0_h, align=4)
    bits0 = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=bits0_h, align=2)
    val0 = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=val0_h, align=2)
    T.attr(T.int32(0), "device_id", 0)
    T.attr(T.int32(0), "device_type", 1)
    for group in range((M + 1) // 2):
        head_at = T.alloc_buffer((1,), "int64", scope="global")
        head_at[0] = group * 2
        head: T.let = head_at[0]
        tokens_at = T.alloc_buffer((1,), "int64", scope="global")
        tokens_at[0] = T.min(M - head, T.int64(2))
        tokens: T.let = tokens_at[0]
        xp_at = T.alloc_buffer((1,), "int64", scope="global")
        xp_at[0] = 2 * (pitch + 0 * reach)
        xp: T.let = xp_at[0]
        for m in range(2):
            xp_from_at = T.alloc_buffer((1,), "int64", scope="global")
            xp_from_at[0] = (head + T.min(m, tokens - 1)) * x_stride
            xp_from: T.let = xp_from_at[0]
            xp_to_at = T.alloc_buffer((1,), "int64", scope="global")
            xp_to_at[0] = xp + m * reach
            xp_to: T.let = xp_to_at[0]
            for k in range(K // 32):
                part_1: T.let = T.reinterpret("float32x16", T.shift_left(T.Cast("uint32x16", x[T.ramp(xp_from + k * 32 + 0, 1, 16)]), T.broadcast(T.uint32(16), 16)))
                part_2: T.let = T.reinterpret("float32x16", T.shift_left(T.Cast("uint32x16", x[T.ramp(xp_from + k * 32 + 16, 1, 16)]), T.broadcast(T.uint32(16), 16)))
                work[T.ramp(xp_to + k * 32 + 0, 1, 16)] = T.Shuffle([part_1, part_2], [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30])
                work[T.ramp(xp_to + k * 32 + 16, 1, 16)] = T.Shuffle([part_1, part_2], [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31])
            for rest in range(reach - K // 32 * 32):
                k: T.let = K // 32 * 32 + rest
                work[xp_to + k // 32 * 32 + k % 2 * 16 + k % 32 // 2] = T.if_then_else(k < K, T.reinterpret("float32", T.shift_left(T.Cast("uint32", x[xp_from + k]), T.uint32(16))), T.float32(0))
        for task in T.parallel(tasks):
            units_at = T.alloc_buffer((1,), "int64", scope="global")
            units_at[0] = (N + 0) // 1
            units: T.let = units_at[0]
            parents_at = T.alloc_buffer((1,), "int64", scope="global")
            parents_at[0] = (N + 0) // 1
            parents: T.let = parents_at[0]
            total_at = T.alloc_buffer((1,), "int64", scope="global")
            total_at[0] = T.Cast("int64", ptr0[parents]) * 2 + parents * ((C0 + 15) // 16 * 2 + 32)
            total: T.let = total_at[0]
            first_low = T.alloc_buffer((1,), "int64", scope="global")
            first_low[0] = T.int64(0)
            first_high = T.alloc_buffer((1,), "int64", scope="global")
            first_high[0] = units
            while first_low[0] < first_high[0]:
                middle: T.let = (first_low[0] + first_high[0]) // 2
                parent: T.let = T.min(parents, middle * 1)
                if (T.Cast("int64", ptr0[parent]) * 2 + parent * ((C0 + 15) // 16 * 2 + 32)) * tasks < task * total:
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
                if (T.Cast("int64", ptr0[parent]) * 2 + parent * ((C0 + 15) // 16 * 2 + 32)) * tasks < (task + 1) * total:
                    last_low[0] = middle + 1
                else:
                    last_high[0] = middle
            last_at = T.alloc_buffer((1,), "int64", scope="global")
            last_at[0] = T.min(N, last_low[0] * 1)
            last: T.let = last_at[0]
            for tile in range((tokens + 1) // 2):
                xp_at_at = T.alloc_buffer((1,), "int64", scope="global")
                xp_at_at[0] = xp + tile * 2 * reach
                xp_at: T.let = xp_at_at[0]
                ot_at = T.alloc_buffer((1,), "int64", scope="global")
                ot_at[0] = tile * 2 * pitch
                ot: T.let = ot_at[0]
                for m in range(2):
                    for v in range((last - first) // 16):
                        at: T.let = first + v * 16
                        work[T.ramp(ot + m * pitch + at, 1, 16)] = T.reinterpret("float32x16", T.shift_left(T.Cast("uint32x16", bias[T.ramp(at, 1, 16)]), T.broadcast(T.uint32(16), 16)))
                    for v in range((last - first) % 16):
                        at: T.let = first + (last - first) // 16 * 16 + v
                        work[ot + m * pitch + at] = T.reinterpret("float32", T.shift_left(T.Cast("uint32", bias[at]), T.uint32(16)))
                begin0_at = T.alloc_buffer((1,), "int64", scope="global")
                begin0_at[0] = first // 1
                begin0: T.let = begin0_at[0]
                count0_at = T.alloc_buffer((1,), "int64", scope="global")
                count0_at[0] = (last - first + 0) // 1
                count0: T.let = count0_at[0]
                each0_at = T.alloc_buffer((1,), "int64", scope="global")
                each0_at[0] = count0 // 2
                each0: T.let = each0_at[0]
                for i in range(each0):
                    place_3: T.let = i
                    place_4: T.let = i + 1 * each0
                    sum5_0 = T.alloc_buffer((16,), "float32", scope="global")
                    sum5_1 = T.alloc_buffer((16,), "float32", scope="global")
                    sum5_2 = T.alloc_buffer((16,), "float32", scope="global")
                    sum5_3 = T.alloc_buffer((16,), "float32", scope="global")
                    sum5_0[T.ramp(0, 1, 16)] = T.broadcast(T.float32(0), 16)
                    sum5_1[T.ramp(0, 1, 16)] = T.broadcast(T.float32(0), 16)
                    sum5_2[T.ramp(0, 1, 16)] = T.broadcast(T.float32(0), 16)
                    sum5_3[T.ramp(0, 1, 16)] = T.broadcast(T.float32(0), 16)
                    parent_6: T.let = begin0 + place_3
                    parent_7: T.let = begin0 + place_4
                    words0: T.let = (C0 + 15) // 16
                    at_8 = T.alloc_buffer((1,), "int64", scope="global")
                    at_8[0] = T.Cast("int64", ptr0[parent_6])
                    at_9 = T.alloc_buffer((1,), "int64", scope="global")
                    at_9[0] = T.Cast("int64", ptr0[parent_7])
                    for word in range(words0 // 2):
                        x_10: T.let = work[T.ramp(xp_at + word * 2 * 16 + 0, 1, 16)]
                        x_11: T.let = work[T.ramp(xp_at + word * 2 * 16 + 16, 1, 16)]
                        x_12: T.let = work[T.ramp(xp_at + 1 * reach + word * 2 * 16 + 0, 1, 16)]
                        x_13: T.let = work[T.ramp(xp_at + 1 * reach + word * 2 * 16 + 16, 1, 16)]
                        mask_14: T.let = T.reinterpret("uint32", bits0[T.ramp(parent_6 * words0 + word * 2, 1, 2)])
                        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(val0[at_8[0] + 512]), T.int32(0), T.int32(3), T.int32(1)))
                        found_15: T.let = T.call_llvm_pure_intrin("uint16x32", "llvm.masked.expandload", T.address_of(val0[at_8[0]]), T.reinterpret("uint1x32", mask_14), T.broadcast(T.uint16(0), 32))
                        two_16: T.let = T.reinterpret("uint32x16", found_15)
                        weight_17: T.let = T.reinterpret("float32x16", T.shift_left(two_16, T.broadcast(T.uint32(16), 16)))
                        weight_18: T.let = T.reinterpret("float32x16", T.bitwise_and(two_16, T.broadcast(T.uint32(4294901760), 16)))
                        sum5_0[T.ramp(0, 1, 16)] = sum5_0[T.ramp(0, 1, 16)] + weight_17 * x_10
                        sum5_1[T.ramp(0, 1, 16)] = sum5_1[T.ramp(0, 1, 16)] + weight_17 * x_12
                        sum5_0[T.ramp(0, 1, 16)] = sum5_0[T.ramp(0, 1, 16)] + weight_18 * x_11
                        sum5_1[T.ramp(0, 1, 16)] = sum5_1[T.ramp(0, 1, 16)] + weight_18 * x_13
                        at_8[0] = at_8[0] + T.Cast("int64", T.popcount(mask_14))
                        mask_19: T.let = T.reinterpret("uint32", bits0[T.ramp(parent_7 * words0 + word * 2, 1, 2)])
                        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(val0[at_9[0] + 512]), T.int32(0), T.int32(3), T.int32(1)))
                        found_20: T.let = T.call_llvm_pure_intrin("uint16x32", "llvm.masked.expandload", T.address_of(val0[at_9[0]]), T.reinterpret("uint1x32", mask_19), T.broadcast(T.uint16(0), 32))
                        two_21: T.let = T.reinterpret("uint32x16", found_20)
                        weight_22: T.let = T.reinterpret("float32x16", T.shift_left(two_21, T.broadcast(T.uint32(16), 16)))
                        weight_23: T.let = T.reinterpret("float32x16", T.bitwise_and(two_21, T.broadcast(T.uint32(4294901760), 16)))
                        sum5_2[T.ramp(0, 1, 16)] = sum5_2[T.ramp(0, 1, 16)] + weight_22 * x_10
                        sum5_3[T.ramp(0, 1, 16)] = sum5_3[T.ramp(0, 1, 16)] + weight_22 * x_12
                        sum5_2[T.ramp(0, 1, 16)] = sum5_2[T.ramp(0, 1, 16)] + weight_23 * x_11
                        sum5_3[T.ramp(0, 1, 16)] = sum5_3[T.ramp(0, 1, 16)] + weight_23 * x_13
                        at_9[0] = at_9[0] + T.Cast("int64", T.popcount(mask_19))
                    if words0 % 2 == 1:
                        x_24: T.let = work[T.ramp(xp_at + (words0 - 1) * 16 + 0, 1, 16)]
                        x_25: T.let = work[T.ramp(xp_at + (words0 - 1) * 16 + 16, 1, 16)]
                        x_26: T.let = work[T.ramp(xp_at + 1 * reach + (words0 - 1) * 16 + 0, 1, 16)]
                        x_27: T.let = work[T.ramp(xp_at + 1 * reach + (words0 - 1) * 16 + 16, 1, 16)]
                        mask_28: T.let = T.Cast("uint32", bits0[parent_6 * words0 + (words0 - 1)])
                        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(val0[at_8[0] + 512]), T.int32(0), T.int32(3), T.int32(1)))
                        found_29: T.let = T.call_llvm_pure_intrin("uint16x32", "llvm.masked.expandload", T.address_of(val0[at_8[0]]), T.reinterpret("uint1x32", mask_28), T.broadcast(T.uint16(0), 32))
                        two_30: T.let = T.reinterpret("uint32x16", found_29)
                        weight_31: T.let = T.reinterpret("float32x16", T.shift_left(two_30, T.broadcast(T.uint32(16), 16)))
                        weight_32: T.let = T.reinterpret("float32x16", T.bitwise_and(two_30, T.broadcast(T.uint32(4294901760), 16)))
                        sum5_0[T.ramp(0, 1, 16)] = sum5_0[T.ramp(0, 1, 16)] + weight_31 * x_24
                        sum5_1[T.ramp(0, 1, 16)] = sum5_1[T.ramp(0, 1, 16)] + weight_31 * x_26
                        sum5_0[T.ramp(0, 1, 16)] = sum5_0[T.ramp(0, 1, 16)] + weight_32 * x_25
                        sum5_1[T.ramp(0, 1, 16)] = sum5_1[T.ramp(0, 1, 16)] + weight_32 * x_27
                        at_8[0] = at_8[0] + T.Cast("int64", T.popcount(mask_28))
                        mask_33: T.let = T.Cast("uint32", bits0[parent_7 * words0 + (words0 - 1)])
                        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(val0[at_9[0] + 512]), T.int32(0), T.int32(3), T.int32(1)))
                        found_34: T.let = T.call_llvm_pure_intrin("uint16x32", "llvm.masked.expandload", T.address_of(val0[at_9[0]]), T.reinterpret("uint1x32", mask_33), T.broadcast(T.uint16(0), 32))
                        two_35: T.let = T.reinterpret("uint32x16", found_34)
                        weight_36: T.let = T.reinterpret("float32x16", T.shift_left(two_35, T.broadcast(T.uint32(16), 16)))
                        weight_37: T.let = T.reinterpret("float32x16", T.bitwise_and(two_35, T.broadcast(T.uint32(4294901760), 16)))
                        sum5_2[T.ramp(0, 1, 16)] = sum5_2[T.ramp(0, 1, 16)] + weight_36 * x_24
                        sum5_3[T.ramp(0, 1, 16)] = sum5_3[T.ramp(0, 1, 16)] + weight_36 * x_26
                        sum5_2[T.ramp(0, 1, 16)] = sum5_2[T.ramp(0, 1, 16)] + weight_37 * x_25
                        sum5_3[T.ramp(0, 1, 16)] = sum5_3[T.ramp(0, 1, 16)] + weight_37 * x_27
                        at_9[0] = at_9[0] + T.Cast("int64", T.popcount(mask_33))
                    half_38: T.let = sum5_0[T.ramp(0, 1, 16)]
                    half_39: T.let = T.Shuffle([half_38], [0, 1, 2, 3, 4, 5, 6, 7]) + T.Shuffle([half_38], [8, 9, 10, 11, 12, 13, 14, 15])
                    half_40: T.let = T.Shuffle([half_39], [0, 1, 2, 3]) + T.Shuffle([half_39], [4, 5, 6, 7])
                    half_41: T.let = T.Shuffle([half_40], [0, 1]) + T.Shuffle([half_40], [2, 3])
                    work[ot + first + place_3 * 1] = work[ot + first + place_3 * 1] + T.Shuffle([half_41], [0]) + T.Shuffle([half_41], [1])
                    half_42: T.let = sum5_1[T.ramp(0, 1, 16)]
                    half_43: T.let = T.Shuffle([half_42], [0, 1, 2, 3, 4, 5, 6, 7]) + T.Shuffle([half_42], [8, 9, 10, 11, 12, 13, 14, 15])
                    half_44: T.let = T.Shuffle([half_43], [0, 1, 2, 3]) + T.Shuffle([half_43], [4, 5, 6, 7])
                    half_45: T.let = T.Shuffle([half_44], [0, 1]) + T.Shuffle([half_44], [2, 3])
                    work[ot + 1 * pitch + first + place_3 * 1] = work[ot + 1 * pitch + first + place_3 * 1] + T.Shuffle([half_45], [0]) + T.Shuffle([half_45], [1])
                    half_46: T.let = sum5_2[T.ramp(0, 1, 16)]
                    half_47: T.let = T.Shuffle([half_46], [0, 1, 2, 3, 4, 5, 6, 7]) + T.Shuffle([half_46], [8, 9, 10, 11, 12, 13, 14, 15])
                    half_48: T.let = T.Shuffle([half_47], [0, 1, 2, 3]) + T.Shuffle([half_47], [4, 5, 6, 7])
                    half_49: T.let = T.Shuffle([half_48], [0, 1]) + T.Shuffle([half_48], [2, 3])
                    work[ot + first + place_4 * 1] = work[ot + first + place_4 * 1] + T.Shuffle([half_49], [0]) + T.Shuffle([half_49], [1])
                    half_50: T.let = sum5_3[T.ramp(0, 1, 16)]
                    half_51: T.let = T.Shuffle([half_50], [0, 1, 2, 3, 4, 5, 6, 7]) + T.Shuffle([half_50], [8, 9, 10, 11, 12, 13, 14, 15])
                    half_52: T.let = T.Shuffle([half_51], [0, 1, 2, 3]) + T.Shuffle([half_51], [4, 5, 6, 7])
                    half_53: T.let = T.Shuffle([half_52], [0, 1]) + T.Shuffle([half_52], [2, 3])
                    work[ot + 1 * pitch + first + place_4 * 1] = work[ot + 1 * pitch + first + place_4 * 1] + T.Shuffle([half_53], [0]) + T.Shuffle([half_53], [1])
                for i in range(count0 - each0 * 2):
                    place_54: T.let = each0 * 2 + i
                    sum55_0 = T.alloc_buffer((16,), "float32", scope="global")
                    sum55_1 = T.alloc_buffer((16,), "float32", scope="global")
                    sum55_0[T.ramp(0, 1, 16)] = T.broadcast(T.float32(0), 16)
                    sum55_1[T.ramp(0, 1, 16)] = T.broadcast(T.float32(0), 16)
                    parent_56: T.let = begin0 + place_54
                    words0: T.let = (C0 + 15) // 16
                    at_57 = T.alloc_buffer((1,), "int64", scope="global")
                    at_57[0] = T.Cast("int64", ptr0[parent_56])
                    for word in range(words0 // 2):
                        x_58: T.let = work[T.ramp(xp_at + word * 2 * 16 + 0, 1, 16)]
                        x_59: T.let = work[T.ramp(xp_at + word * 2 * 16 + 16, 1, 16)]
                        x_60: T.let = work[T.ramp(xp_at + 1 * reach + word * 2 * 16 + 0, 1, 16)]
                        x_61: T.let = work[T.ramp(xp_at + 1 * reach + word * 2 * 16 + 16, 1, 16)]
                        mask_62: T.let = T.reinterpret("uint32", bits0[T.ramp(parent_56 * words0 + word * 2, 1, 2)])
                        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(val0[at_57[0] + 512]), T.int32(0), T.int32(3), T.int32(1)))
                        found_63: T.let = T.call_llvm_pure_intrin("uint16x32", "llvm.masked.expandload", T.address_of(val0[at_57[0]]), T.reinterpret("uint1x32", mask_62), T.broadcast(T.uint16(0), 32))
                        two_64: T.let = T.reinterpret("uint32x16", found_63)
                        weight_65: T.let = T.reinterpret("float32x16", T.shift_left(two_64, T.broadcast(T.uint32(16), 16)))
                        weight_66: T.let = T.reinterpret("float32x16", T.bitwise_and(two_64, T.broadcast(T.uint32(4294901760), 16)))
                        sum55_0[T.ramp(0, 1, 16)] = sum55_0[T.ramp(0, 1, 16)] + weight_65 * x_58
                        sum55_1[T.ramp(0, 1, 16)] = sum55_1[T.ramp(0, 1, 16)] + weight_65 * x_60
                        sum55_0[T.ramp(0, 1, 16)] = sum55_0[T.ramp(0, 1, 16)] + weight_66 * x_59
                        sum55_1[T.ramp(0, 1, 16)] = sum55_1[T.ramp(0, 1, 16)] + weight_66 * x_61
                        at_57[0] = at_57[0] + T.Cast("int64", T.popcount(mask_62))
                    if words0 % 2 == 1:
                        x_67: T.let = work[T.ramp(xp_at + (words0 - 1) * 16 + 0, 1, 16)]
                        x_68: T.let = work[T.ramp(xp_at + (words0 - 1) * 16 + 16, 1, 16)]
                        x_69: T.let = work[T.ramp(xp_at + 1 * reach + (words0 - 1) * 16 + 0, 1, 16)]
                        x_70: T.let = work[T.ramp(xp_at + 1 * reach + (words0 - 1) * 16 + 16, 1, 16)]
                        mask_71: T.let = T.Cast("uint32", bits0[parent_56 * words0 + (words0 - 1)])
                        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(val0[at_57[0] + 512]), T.int32(0), T.int32(3), T.int32(1)))
                        found_72: T.let = T.call_llvm_pure_intrin("uint16x32", "llvm.masked.expandload", T.address_of(val0[at_57[0]]), T.reinterpret("uint1x32", mask_71), T.broadcast(T.uint16(0), 32))
                        two_73: T.let = T.reinterpret("uint32x16", found_72)
                        weight_74: T.let = T.reinterpret("float32x16", T.shift_left(two_73, T.broadcast(T.uint32(16), 16)))
                        weight_75: T.let = T.reinterpret("float32x16", T.bitwise_and(two_73, T.broadcast(T.uint32(4294901760), 16)))
                        sum55_0[T.ramp(0, 1, 16)] = sum55_0[T.ramp(0, 1, 16)] + weight_74 * x_67
                        sum55_1[T.ramp(0, 1, 16)] = sum55_1[T.ramp(0, 1, 16)] + weight_74 * x_69
                        sum55_0[T.ramp(0, 1, 16)] = sum55_0[T.ramp(0, 1, 16)] + weight_75 * x_68
                        sum55_1[T.ramp(0, 1, 16)] = sum55_1[T.ramp(0, 1, 16)] + weight_75 * x_70
                        at_57[0] = at_57[0] + T.Cast("int64", T.popcount(mask_71))
                    half_76: T.let = sum55_0[T.ramp(0, 1, 16)]
                    half_77: T.let = T.Shuffle([half_76], [0, 1, 2, 3, 4, 5, 6, 7]) + T.Shuffle([half_76], [8, 9, 10, 11, 12, 13, 14, 15])
                    half_78: T.let = T.Shuffle([half_77], [0, 1, 2, 3]) + T.Shuffle([half_77], [4, 5, 6, 7])
                    half_79: T.let = T.Shuffle([half_78], [0, 1]) + T.Shuffle([half_78], [2, 3])
                    work[ot + first + place_54 * 1] = work[ot + first + place_54 * 1] + T.Shuffle([half_79], [0]) + T.Shuffle([half_79], [1])
                    half_80: T.let = sum55_1[T.ramp(0, 1, 16)]
                    half_81: T.let = T.Shuffle([half_80], [0, 1, 2, 3, 4, 5, 6, 7]) + T.Shuffle([half_80], [8, 9, 10, 11, 12, 13, 14, 15])
                    half_82: T.let = T.Shuffle([half_81], [0, 1, 2, 3]) + T.Shuffle([half_81], [4, 5, 6, 7])
                    half_83: T.let = T.Shuffle([half_82], [0, 1]) + T.Shuffle([half_82], [2, 3])
                    work[ot + 1 * pitch + first + place_54 * 1] = work[ot + 1 * pitch + first + place_54 * 1] + T.Shuffle([half_83], [0]) + T.Shuffle([half_83], [1])
                for m in range(T.min(T.int64(2), tokens - tile * 2)):
                    row_at = T.alloc_buffer((1,), "int64", scope="global")
                    row_at[0] = head + tile * 2 + m
                    row: T.let = row_at[0]
                    for v in range((last - first) // 16):
                        at: T.let = first + v * 16
                        bits_84: T.let = T.reinterpret("uint32x16", work[T.ramp(ot + m * pitch + at, 1, 16)] + T.reinterpret("float32x16", T.shift_left(T.Cast("uint32x16", res[T.ramp(row * res_stride + at, 1, 16)]), T.broadcast(T.uint32(16), 16))))
                        rounded_85: T.let = T.shift_right(bits_84 + T.broadcast(T.uint32(32767), 16) + T.bitwise_and(T.shift_right(bits_84, T.broadcast(T.uint32(16), 16)), T.broadcast(T.uint32(1), 16)), T.broadcast(T.uint32(16), 16))
                        y[T.ramp(row * y_stride + at, 1, 16)] = T.Cast("uint16x16", T.Select(T.bitwise_and(bits_84, T.broadcast(T.uint32(2147483647), 16)) > T.broadcast(T.uint32(2139095040), 16), T.broadcast(T.uint32(32704), 16), rounded_85))
                    for v in range((last - first) % 16):
                        at: T.let = first + (last - first) // 16 * 16 + v
                        bits_86: T.let = T.reinterpret("uint32", work[ot + m * pitch + at] + T.reinterpret("float32", T.shift_left(T.Cast("uint32", res[row * res_stride + at]), T.uint32(16))))
                        rounded_87: T.let = T.shift_right(bits_86 + T.uint32(32767) + T.bitwise_and(T.shift_right(bits_86, T.uint32(16)), T.uint32(1)), T.uint32(16))
                        y[row * y_stride + at] = T.Cast("uint16", T.Select(T.bitwise_and(bits_86, T.uint32(2147483647)) > T.uint32(2139095040), T.uint32(32704), rounded_87))
