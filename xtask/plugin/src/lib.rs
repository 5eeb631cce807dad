//! A plugin for QEMU's TCG that counts who executes how many instructions: `-plugin file=libplugin.so,out=FILE`.
//!
//! It counts by owner ([`owner`]): instructions, CR3 loads, and entries, that is, how often execution went from one owner to
//! another. Programs cut the counts into windows by marker no-ops (`marker`); a kernel's first instruction is a point. With
//! `until=TEXT` there is a window from there to the OUT that writes the last byte of TEXT to the first serial line. With
//! `profile=on` it also says which pieces of ring 0's and dom0's code the instructions belong to, and with `stays=on` how long
//! the stays in ring 0 were.
//!
//! The guest is not disturbed, and neither is its `-icount` clock: ordinary code meets inline additions only, and a
//! function is called where the owner changes and at markers. Translation blocks are counted when they begin, so one that a
//! fault cuts short counts in full; ring 0 does not fault, and the guest programs' error is some instructions per fault.
//!
//! Touches: the output file. Never touches: the machine that is emulated.
//!
//! | line of output | meaning |
//! | --- | --- |
//! | `window N key=count ...` | the window N has ended; what was counted in it |
//! | `point N key=count ...` | the point N was reached; what was counted since power-on |
//! | `total 0 key=count ...` | the machine has ended |
//! | `at ADDRESS count` | after a window or the total: instructions in translation blocks that begin at ADDRESS |
//! | `stay FROM CAUSE length count` | likewise: how often ring 0 was entered from FROM and stayed for so many instructions |
//!
//! A CAUSE is `syscall` (of a program), `hypercall:RAX` or `at:ADDRESS`, the first instruction in ring 0.
//! Keys are `insns.OWNER`, `cr3.OWNER` and `entry.FROM.TO`; what is zero is left out.

mod code;
mod owner;
#[cfg_attr(test, allow(dead_code, reason = "its user is left out of tests"))]
mod stays;
#[cfg_attr(test, allow(dead_code, reason = "its user is left out of tests"))]
mod text;

#[cfg(not(test))]
mod count;
#[cfg(not(test))]
mod qemu;
