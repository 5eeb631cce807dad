//! The few instructions that mean something.

use marker::Kind;

/// The marker, if the instruction is one.
pub(crate) fn marker(code: &[u8]) -> Option<(Kind, u16)> {
    marker::parse(code.try_into().ok()?)
}

/// Whether the instruction loads CR3.
pub(crate) fn loads_cr3(code: &[u8]) -> bool {
    let code = match code {
        [0x40..=0x4f, rest @ ..] => rest,
        code => code,
    };
    matches!(code, [0x0f, 0x22, register] if register >> 3 & 7 == 3)
}

/// Whether the instruction is SYSCALL.
pub(crate) fn is_syscall(code: &[u8]) -> bool {
    code == [0x0f, 0x05]
}

/// Whether the instruction writes the byte in AL to the port in DX.
pub(crate) fn writes_port(code: &[u8]) -> bool {
    code == [0xee]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_of_cr3_are_known_and_nothing_else_is() {
        // mov cr3, rax; mov cr3, r15; mov cr4, rax; mov rax, cr3; mov cr11, rax would be REX.R and is none.
        assert!(loads_cr3(&[0x0f, 0x22, 0xd8]));
        assert!(loads_cr3(&[0x41, 0x0f, 0x22, 0xdf]));
        assert!(!loads_cr3(&[0x0f, 0x22, 0xe0]));
        assert!(!loads_cr3(&[0x0f, 0x20, 0xd8]));
        assert!(!loads_cr3(&[0x90]));
        assert!(!loads_cr3(&[]));
    }

    #[test]
    fn syscall_is_known_and_sysret_is_not() {
        assert!(is_syscall(&[0x0f, 0x05]));
        assert!(!is_syscall(&[0x0f, 0x07]));
        assert!(!is_syscall(&[0x48, 0x0f, 0x07]));
    }

    #[test]
    fn a_byte_for_a_port_is_known() {
        // out dx, al; out dx, eax; in al, dx; outsb
        assert!(writes_port(&[0xee]));
        assert!([0xef, 0xec, 0x6e].into_iter().all(|code| !writes_port(&[code])));
    }

    #[test]
    fn a_marker_is_found() {
        let mut code = [0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0];
        code[4..].copy_from_slice(&marker::word(Kind::Point, marker::INIT).to_le_bytes());
        assert_eq!(marker(&code), Some((Kind::Point, marker::INIT)));
        assert_eq!(marker(&code[..7]), None);
    }
}
