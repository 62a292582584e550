"""Operations on whole networks that hold batch norm of any make."""
