//! Error numbers: hypercalls return them negated in `rax` (core 10.9).

abi! {
    /// Why a call was refused: the numbers that one of our calls answers with, and a few that a guest may expect.
    pub enum Errno: u64 {
        /// Not permitted.
        Perm = 1,
        /// No such entry.
        NoEnt = 2,
        /// No such domain.
        Srch = 3,
        /// No such address or device.
        NxIo = 6,
        /// Try again.
        Again = 11,
        /// Out of memory.
        NoMem = 12,
        /// Access denied.
        Acces = 13,
        /// Bad guest address.
        Fault = 14,
        /// In use.
        Busy = 16,
        /// Exists already.
        Exist = 17,
        /// No such device.
        NoDev = 19,
        /// Invalid argument.
        Inval = 22,
        /// No space left.
        NoSpc = 28,
        /// No such call.
        NoSys = 38,
        /// Nothing to tell.
        NoData = 61,
        /// The call is to be executed again.
        Restart = 85,
        /// Operation not supported.
        OpNotSupp = 95,
    }
}

impl Errno {
    /// The value of `rax`.
    #[must_use]
    pub const fn to_rax(self) -> u64 {
        (self as u64).wrapping_neg()
    }

    /// Reads a result register: values -4095..=-1 are errors.
    ///
    /// # Errors
    /// The error the hypervisor answered; a number this list lacks reads as [`Errno::Inval`].
    pub fn from_rax(rax: u64) -> Result<u64, Self> {
        let negated = rax.wrapping_neg();
        if (1..=4095).contains(&negated) { Err(Self::from_number(negated).unwrap_or(Self::Inval)) } else { Ok(rax) }
    }
}
